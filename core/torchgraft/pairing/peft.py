"""Pair an adapter that PEFT wrote, by its config and the names of its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from torchgraft.adapter_files import peft_names
from torchgraft.adapter_files.reading import AdapterFiles
from torchgraft.errors import PairingError
from torchgraft.layers.layer import Layer, is_inside
from torchgraft.layers.plan import site_of
from torchgraft.method.config import Config, explained
from torchgraft.method.method import Method
from torchgraft.pairing.base import Base, layer_of
from torchgraft.pairing.pairing import PairedSite, Pairing
from torchgraft.plugin.registry import registry


def pair_peft(files: AdapterFiles, base: Base) -> Pairing:
    """Match the tensors' names with the base's layers, and the config's targets with both."""
    method, config = _method_of_peft(files)
    assert method.peft is not None
    also_train = _saved_modules(files, base)
    pairing, whole = Pairing(files, method, config, also_train=also_train), frozenset(also_train)
    tensors: dict[str, list[str]] = defaultdict(list)
    for key in files.shapes:
        name = key.removeprefix(files.prefix)
        if name == key:
            pairing.problems.append(f"the tensor {key!r} does not start with {files.prefix!r}, as PEFT's names do")
        elif not is_inside(name, whole) and (owner := layer_of(name, base.layers)):
            tensors[owner].append(key)
    for name, keys in tensors.items():
        _pair_peft_site(pairing, files, base.layers[name], keys, base.is_module)
    for layer in dict.fromkeys(base.layers.values()):
        if layer.kind is not None and layer.name not in tensors and peft_names.is_target(files.peft, layer):
            pairing.problems.append(f"{layer.name}: target_modules match this layer, but the adapter has no tensor for it")
    return pairing


def _pair_peft_site(pairing: Pairing, files: AdapterFiles, layer: Layer, tensors: list[str], is_module: bool) -> None:
    peft = dict(files.peft)
    named = {name: files.shapes[name][1] for name in tensors}
    if layer.kind is None:
        pairing.problems.append(
            f"{layer.name}: {layer.reason or f'is a {layer.role} layer of shape {list(layer.shape)}, which cannot have an adapter'}"
        )
        return
    assert pairing.method.peft is not None
    suffixes = {name.removeprefix(f"{files.prefix}{layer.name}."): shape for name, shape in named.items()}
    groups = layer.groups if is_module else pairing.method.peft.groups(layer.shape, suffixes)
    site = site_of(replace(layer, groups=groups))
    try:
        peft["r"] = peft_names.pattern_value(peft.get("rank_pattern") or {}, layer.name, peft.get("r", 8))
        peft["lora_alpha"] = peft_names.pattern_value(peft.get("alpha_pattern") or {}, layer.name, peft.get("lora_alpha", 8))
        config = pairing.method.peft.from_config(peft, site)
    except (TypeError, ValueError) as error:
        pairing.problems.append(f"{layer.name}: adapter_config.json is not valid for it: {explained(error)}")
        return
    except PairingError as error:
        pairing.problems.append(str(error))
        return
    assert config is not None
    pairing.sites.append(PairedSite(site, config, site.name))


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
