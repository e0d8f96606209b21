"""Pair an adapter that PEFT wrote, by its config and the names of its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

from torchgraft.adapter_files import peft_names
from torchgraft.adapter_files.peft_lora import kinds_told
from torchgraft.adapter_files.reading import AdapterFiles
from torchgraft.errors import PairingError
from torchgraft.kinds.kind import Shape
from torchgraft.layers.layer import Layer, is_inside
from torchgraft.layers.plan import site_of
from torchgraft.method.config import Config, explained
from torchgraft.method.method import Method
from torchgraft.pairing.base import Base, layer_of
from torchgraft.pairing.pairing import PairedSite, Pairing, paired_site
from torchgraft.plugin.registry import registry


def pair_peft(files: AdapterFiles, base: Base, *, complete: bool = True) -> Pairing:
    """Match the tensors' names with the base's layers and, if `complete`, the config's targets with both."""
    method, config = _method_of_peft(files)
    assert method.peft is not None
    also_train = _saved_modules(files, base)
    tensors = _tensors_of_layers(files, base, frozenset(also_train))
    sites, problems = (
        list[PairedSite](),
        [
            f"the tensor {key!r} does not start with {files.prefix!r}, as PEFT's names do"
            for key in files.shapes
            if not key.startswith(files.prefix)
        ],
    )
    for name, keys in tensors.items():
        try:
            sites.append(_site_of_tensors(files, method, base.layers[name], keys, base))
        except PairingError as error:
            problems.append(str(error))
    missing = [
        layer.name
        for layer in dict.fromkeys(base.layers.values())
        if complete and layer.kind is not None and layer.name not in tensors and peft_names.is_target(files.peft, layer)
    ]
    model = base.architecture() if missing else None
    beyond = [name for name in missing if model and name not in model.loaded]
    problems += [f"{name}: target_modules match this layer, but the adapter has no tensor for it" for name in missing if name not in beyond]
    remarks = (
        [f"{len(beyond)} layers stay as they are, because {model.model} does not load them: {_some(beyond)}"] if beyond and model else []
    )
    return Pairing(files, method, config, tuple(sites), also_train=also_train, problems=tuple(problems), remarks=tuple(remarks))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ("…" if names[3:] else "")


def _tensors_of_layers(files: AdapterFiles, base: Base, whole: Container[str]) -> dict[str, list[str]]:
    """Map each layer of the base to the names of its tensors in the adapter's file, except for modules that the file has whole."""
    tensors: dict[str, list[str]] = defaultdict(list)
    for key in files.shapes:
        name = key.removeprefix(files.prefix)
        if name != key and not is_inside(name, whole) and (owner := layer_of(name, base.layers)):
            tensors[owner].append(key)
    return tensors


def _site_of_tensors(files: AdapterFiles, method: Method, layer: Layer, tensors: list[str], base: Base) -> PairedSite:
    """Return the site of one layer, with the options that adapter_config.json gives it.

    Raises:
        PairingError: the layer cannot have an adapter, or the options do not fit it.
    """
    assert method.peft is not None
    suffixes = {name.removeprefix(f"{files.prefix}{layer.name}."): files.shapes[name][1] for name in tensors}
    if layer.kind is None and layer.is_open:
        layer = replace(layer, kind=_kind_told(files, layer, suffixes, base))
    if layer.kind is None:
        reason = layer.reason or f"is a {layer.role} layer of shape {list(layer.shape)}, which cannot have an adapter"
        raise PairingError(f"{layer.name}: {reason}")
    site = site_of(replace(layer, groups=layer.groups if base.is_module else method.peft.groups(layer.shape, suffixes)))
    own = dict(files.peft)
    try:
        own["r"] = peft_names.pattern_value(own.get("rank_pattern") or {}, layer.name, own.get("r", 8))
        own["lora_alpha"] = peft_names.pattern_value(own.get("alpha_pattern") or {}, layer.name, own.get("lora_alpha", 8))
        config = method.peft.from_config(own, site)
    except (TypeError, ValueError) as error:
        raise PairingError(f"{layer.name}: adapter_config.json is not valid for it: {explained(error)}") from None
    assert config is not None
    return paired_site(files, method, site, config, site.name)


def _kind_told(files: AdapterFiles, layer: Layer, suffixes: Mapping[str, Shape], base: Base) -> str | None:
    """Return the kind of a layer whose orientation its name does not show: the adapter's shapes show it, or, if it is square, the model."""
    kinds = kinds_told(layer.shape, suffixes)
    if len(kinds) < 2:
        return kinds[0] if kinds else None
    model = base.architecture()
    if model and layer.name in model.kinds:
        return model.kinds[layer.name]
    return "Conv1D" if files.peft.get("fan_in_fan_out") else "Linear"


def _method_of_peft(files: AdapterFiles) -> tuple[Method, Config]:
    kind = files.peft.get("peft_type")
    for method in registry().methods():
        try:
            config = method.peft.from_config(files.peft) if method.peft is not None else None
        except (TypeError, ValueError) as error:
            raise PairingError(f"{files.directory}: adapter_config.json is not valid: {explained(error)}") from None
        except PairingError as error:
            raise PairingError(f"{files.directory}: {error}") from None
        if config is not None:
            return method, config
    found = f"peft_type {kind!r}" + (" with use_dora" if files.peft.get("use_dora") else "")
    raise PairingError(f"{files.directory}: no installed method reads PEFT's {found}; see 'adapt plugins list'")


def _saved_modules(files: AdapterFiles, base: Base) -> tuple[str, ...]:
    """Return the base's modules that `modules_to_save` names, and those in the file that the base lacks."""
    wanted = tuple(files.peft.get("modules_to_save") or [])
    found = peft_names.saved_modules(wanted, _parents(base.tensors))
    in_file = _parents(name.removeprefix(files.prefix) for name in files.shapes)
    absent = [name for name in in_file if any(name == want or name.endswith(f".{want}") for want in wanted) and not is_inside(name, found)]
    return (*found, *absent)


def _parents(tensors: Iterable[str]) -> list[str]:
    """Return every module that the names of tensors imply."""
    return sorted({name[:place] for name in tensors for place, character in enumerate(name) if character == "."})
