"""What transformers calls a tensor, in memory and in files: from version 5 on, the two differ for many models.

The mapping is transformers' own, by the functions with which it loads and saves; PEFT uses them, too. All that may change there is
in this module. A tensor that it also fuses, splits or permutes on the way has no other name: it is another tensor.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchgraft.errors import PairingError
from torchgraft.pairing.naming import Naming

if TYPE_CHECKING:
    from torch import nn


def of_checkpoint(config: Mapping[str, Any], tensors: Iterable[str]) -> list[Naming]:
    """The names in memory of a checkpoint's tensors, and those that transformers would save, where they are others than in these files.

    Args:
        config: config.json; without a model_type it is no model of transformers.

    Raises:
        PairingError: transformers is not installed or does not know the model.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return []
    try:
        with _quietly():
            return _namings(_on_meta(config), list(tensors))
    except ImportError:
        raise PairingError(
            f"transformers may have other names for a {model_type}'s layers; install torchgraft[hf] to have them tried"
        ) from None
    except Exception as error:  # whatever a config.json from anywhere, or another version of transformers, makes it raise
        raise PairingError(f"transformers' names for a {model_type}'s layers could not be tried: {_said(error)}") from error


def of_module(model: nn.Module, tensors: Iterable[str]) -> list[Naming]:
    """The names that the tensors of a model in memory have in its files.

    Raises:
        PairingError: transformers, which the model is from, does not tell them.
    """
    transformers = sys.modules.get("transformers")  # no model is from it where it was never imported
    if transformers is None:
        return []
    try:
        return _namings(model, list(tensors)) if isinstance(model, transformers.PreTrainedModel) else []
    except Exception as error:  # as above
        raise PairingError(f"transformers' names for the files of a {type(model).__name__} could not be tried: {_said(error)}") from error


def _on_meta(config: Mapping[str, Any]) -> nn.Module:
    """The model that config.json describes, without weights. Code that came with the checkpoint is not run."""
    import torch
    import transformers

    known = transformers.AutoConfig.for_model(**config)
    names = config.get("architectures") or [""]
    cls = getattr(transformers, str(names[0]), None)
    with torch.device("meta"):
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            model: nn.Module = cls(known)
        else:
            model = transformers.AutoModel.from_config(known)  # type: ignore[no-untyped-call]
    return model


def _namings(model: Any, tensors: Sequence[str]) -> list[Naming]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    in_memory = _renamed(get_model_conversion_mapping(model), {name: name for name in tensors})
    saving = [change.reverse_transform() for change in reversed(get_model_conversion_mapping(model, add_legacy=False))]
    # It saves with these prefixes only if the files that were loaded had them.
    without_prefixes = [change for change in saving if not isinstance(change, PrefixChange)]
    in_files = [_renamed(changes, in_memory, converters_first=True) for changes in (without_prefixes, saving)]
    return [Naming(names) for names in (in_memory, *in_files) if any(name != own for name, own in names.items())]


def _renamed(changes: Sequence[Any], names: Mapping[str, str], *, converters_first: bool = False) -> dict[str, str]:
    """New name → own name, as transformers renames on loading; on saving it looks for tensors to convert first."""
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
    """What transformers has to say of a config is for who loads the model."""
    from transformers import utils

    before = utils.logging.get_verbosity()
    utils.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        utils.logging.set_verbosity(before)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
