"""Map transformers' tensor names between memory and files: since version 5 they differ for many models.

The mapping comes from the functions with which transformers (and PEFT) load and save. All use of these unstable functions is
in this module. A tensor that transformers also fuses, splits or permutes is a different tensor and gets no other name.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torchgraft.errors import PairingError
from torchgraft.layers.layer import parent_of
from torchgraft.pairing.naming import Naming

if TYPE_CHECKING:
    from torch import nn


AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMaskedLM", "AutoModel")
"""Classes that load one checkpoint into models of different names, such as the text model of a vision-language model."""


def of_checkpoint(config: Mapping[str, Any], tensors: Iterable[str]) -> Iterator[Naming]:
    """Yield the names of a checkpoint's tensors in memory and as saved by transformers, if they differ from the files'.

    First come those of the class that config.json names, then those of the other classes that load such a checkpoint.

    Args:
        config: config.json; without a model_type it is not a transformers model.

    Raises:
        PairingError: transformers is not installed or does not know the model.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return
    names = list(tensors)
    try:
        with _quietly():
            model = _on_meta(config)
            first = _namings(model, names)
    except ImportError:
        raise PairingError(
            f"transformers may have other names for a {model_type}'s layers; install torchgraft[hf] to have them tried"
        ) from None
    except Exception as error:  # any type is possible with an unknown config.json or version of transformers
        raise PairingError(f"transformers' names for a {model_type}'s layers could not be tried: {_summary(error)}") from error
    yield from first
    known: set[type] = {type(model)}
    for auto in AUTO:
        with _quietly():
            other = _auto_on_meta(auto, config)
            found = _namings(other, names) if other is not None and type(other) not in known else []
        known.add(type(other))
        yield from found


def _auto_on_meta(auto: str, config: Mapping[str, Any]) -> nn.Module | None:
    """Build a model by one of the classes in `AUTO` on the meta device; None if it loads no such checkpoint."""
    import torch
    import transformers

    try:
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(**config))
    except Exception:  # noqa: BLE001  (any type is possible, and most checkpoints are of one class)
        return None
    return model


@dataclass(frozen=True)
class Architecture:
    """What the model class of transformers shows about a checkpoint's modules, by their names in the files."""

    model: str
    """Name of the class."""
    loaded: frozenset[str]
    """The modules that the class loads."""
    kinds: Mapping[str, str]
    """Module → its kind in the model."""

    def named(self, others: Mapping[str, str]) -> Architecture:
        """Return the same with other names of the modules."""
        kinds = {others[name]: kind for name, kind in self.kinds.items() if name in others}
        return replace(self, loaded=frozenset(others[name] for name in self.loaded if name in others), kinds=kinds)


def architecture(config: Mapping[str, Any], tensors: Iterable[str]) -> Architecture | None:
    """Return what the model class shows about a checkpoint's modules; None if transformers is not installed or cannot build it."""
    if not isinstance(config.get("model_type"), str):
        return None
    try:
        with _quietly():
            return _architecture(_on_meta(config), list(tensors))
    except Exception:  # noqa: BLE001  (as in `of_checkpoint`; the files alone then decide)
        return None


def _architecture(model: Any, tensors: Sequence[str]) -> Architecture:
    from transformers.conversion_mapping import get_model_conversion_mapping

    from torchgraft.kinds.kind import kind_of
    from torchgraft.plugin.registry import registry

    in_memory = _renamed(get_model_conversion_mapping(model), {name: name for name in tensors})
    own, prefix = set(model.state_dict()), f"{model.base_model_prefix}."
    found = {
        name: next((each for each in (new, prefix + new, new.removeprefix(prefix)) if each in own), "") for new, name in in_memory.items()
    }
    converted = set(tensors) - found.keys()  # fused or split on loading
    loaded = converted | {name for name, new in found.items() if new}
    kinds = registry().kinds()
    modules = {name: kind.name for name, module in model.named_modules() if (kind := kind_of(module, kinds)[0])}
    known = {parent_of(name): modules.get(parent_of(new), "") for name, new in found.items() if new.endswith(".weight")}
    return Architecture(type(model).__name__, frozenset(map(parent_of, loaded)), {name: kind for name, kind in known.items() if kind})


def of_module(model: nn.Module, tensors: Iterable[str]) -> list[Naming]:
    """Return the names that the tensors of a model in memory have in its files.

    Raises:
        PairingError: transformers fails to map the names of its model.
    """
    transformers = sys.modules.get("transformers")  # if it was never imported, the model is not from it
    if transformers is None:
        return []
    try:
        return _namings(model, list(tensors)) if isinstance(model, transformers.PreTrainedModel) else []
    except Exception as error:  # as above
        raise PairingError(
            f"transformers' names for the files of a {type(model).__name__} could not be tried: {_summary(error)}"
        ) from error


def _on_meta(config: Mapping[str, Any]) -> nn.Module:
    """Build the model that config.json describes on the meta device. Code from the checkpoint is not run."""
    import torch
    import transformers

    known = transformers.AutoConfig.for_model(**config)
    names = config.get("architectures") or [""]
    cls = getattr(transformers, str(names[0]), None)
    with torch.device("meta"):
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            model: nn.Module = cls(known)
        else:
            model = transformers.AutoModel.from_config(known)
    return model


def _namings(model: Any, tensors: Sequence[str]) -> list[Naming]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    in_memory = _renamed(get_model_conversion_mapping(model), {name: name for name in tensors})
    saving = [change.reverse_transform() for change in reversed(get_model_conversion_mapping(model, add_legacy=False))]
    # transformers saves with these prefixes only if the loaded files had them.
    without_prefixes = [change for change in saving if not isinstance(change, PrefixChange)]
    in_files = [_renamed(changes, in_memory, converters_first=True) for changes in (without_prefixes, saving)]
    return [Naming(names) for names in (in_memory, *in_files) if any(name != own for name, own in names.items())]


def _renamed(changes: Sequence[Any], names: Mapping[str, str], *, converters_first: bool = False) -> dict[str, str]:
    """Return new name → own name, as transformers renames on loading; on saving it looks for tensors to convert first."""
    from transformers.core_model_loading import WeightConverter

    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    renamed = {}
    for name in sorted(names):  # some changes need to see the names in this order
        new = name
        for change in renamings:
            new, _ = change.rename_source_key(new)
        looked_at = name if converters_first else new
        if not any(change.rename_source_key(looked_at)[1] for change in converters):
            renamed[new] = names[name]
    return renamed


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence transformers' config warnings: they are addressed to whoever loads the model."""
    from transformers import utils

    before = utils.logging.get_verbosity()
    utils.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        utils.logging.set_verbosity(before)


def _summary(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
