"""Writing an adapter directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchgraft import peft_names
from torchgraft.adapter_files import FORMAT, NATIVE, NATIVE_TENSORS, PEFT_CONFIG, PEFT_TENSORS, STATE_TENSORS, meaning
from torchgraft.disk import json_bytes, replace_file
from torchgraft.errors import FileFormatError
from torchgraft.graft import SitePart
from torchgraft.hashes import sha256_of_bytes
from torchgraft.method.config import Config
from torchgraft.method.method import Method
from torchgraft.method.site import Site, fingerprint_of
from torchgraft.module_merge import frozen_fingerprint
from torchgraft.plugin.registry import registry
from torchgraft.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from torchgraft.adapter import Adapter


@dataclass(frozen=True)
class SavedSite:
    site: Site
    config: Config
    params: Mapping[str, Tensor]
    fingerprint: str
    """Of the weight that the adapter is for; empty if it is not known."""
    beneath: Sequence[str] = ()
    """The adapters that a method which depends on the weight was trained over."""


@dataclass(frozen=True)
class Contents:
    """What an adapter directory holds, wherever it comes from."""

    method: Method
    config: Config
    sites: list[SavedSite]
    trained: dict[str, Mapping[str, Tensor]]
    """Module that is trained whole → its state."""
    also_train: tuple[str, ...]
    """The names under which those modules were asked for."""
    also_saved: dict[str, Mapping[str, Tensor]]
    """Further modules that PEFT looks for, since their names end like one of those; as they are in the base."""
    modules: list[str] | None
    """The names of all modules of the base, if they are known."""
    base: str | None
    """The base's name or path, as the user gave it."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What the method keeps between its steps."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Digests of the tensors that the sites share."""
    quantized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further layers of the base that were quantised, and how: it was trained against these, too."""


def save(adapter: Adapter, directory: str | PathLike[str]) -> None:
    """Write `adapter` into `directory`, which is made if need be; each file is replaced in one step."""
    from torchgraft.layers.of_module import named_base_modules, own_state

    modules = [name for name, _ in named_base_modules(adapter.model)]
    contents = Contents(
        method=registry().method(adapter.method),
        config=adapter.config,
        sites=[_saved(part) for part in adapter.parts.values()],
        trained={name: copy.module.state_dict() for name, copy in adapter.copies.items()},
        also_train=adapter.plan.trained,
        also_saved={name: own_state(adapter.model.get_submodule(name)) for name in also_saved(adapter.plan.trained, modules)},
        modules=modules,
        base=getattr(getattr(adapter.model, "config", None), "_name_or_path", None) or None,
        state=adapter.state,
        shared=next((part.shared.digests() for part in adapter.parts.values() if part.shared is not None), {}),
        quantized=_quantized(adapter),
    )
    write(contents, Path(directory))


def _quantized(adapter: Adapter) -> dict[str, dict[str, Any]]:
    from torchgraft.layers.of_module import layers_of_module

    found = {}
    for layer in layers_of_module(adapter.model, registry().kinds()):
        if layer.kind is not None and layer.name not in adapter.parts and (kind := registry().kind(layer.kind)).quantized:
            found[layer.name] = {**kind.quantization(adapter.model.get_submodule(layer.name)), "from": layer.dtype}
    return found


def _saved(part: SitePart) -> SavedSite:
    site, beneath = part.site, [] if part.hooks.method.additive or part.site.beneath is None else part.site.beneath.names()
    if part.site.weight_tensors()[0].is_meta:
        known = part.fingerprint
    elif part.undo is not None:
        known = part.undo.fingerprint
    elif part.hooks.method.additive:
        known = frozen_fingerprint(site)
    else:  # of a weight with adapters in it that are not merged, the last bits are those of the arithmetic here
        known = "" if beneath else fingerprint_of(site)
    return SavedSite(site, part.config, part.tensors(), known, beneath)


def also_saved(also_train: Sequence[str], modules: Sequence[str]) -> list[str]:
    return [name for name in peft_names.saved_modules(also_train, modules) if name not in also_train]


def write(contents: Contents, directory: Path, *, native: bool = True) -> None:
    """Write the tensors, PEFT's config if PEFT knows the method, and last the record that names the tensors' hash.

    Args:
        native: whether the record and the method's state are written; without them it is an adapter as PEFT writes it.

    Raises:
        FileFormatError: the directory cannot be written.
    """
    peft = contents.method.peft is not None
    data = _serialized(_named_tensors(contents))
    config = _peft_config(contents) if peft else {}
    state = {key: value for key, value in contents.state.items() if hasattr(value, "detach")} if native else {}
    file, stale = (PEFT_TENSORS, [NATIVE_TENSORS]) if peft else (NATIVE_TENSORS, [PEFT_TENSORS, PEFT_CONFIG])
    files = {file: data, STATE_TENSORS: _serialized(state) if state else b"", PEFT_CONFIG: json_bytes(config) if config else b""}
    if native:
        record = _record(contents, file, data) | ({"peft_config": meaning(config)} if config else {})
        if contents.state:
            values = {key: value for key, value in contents.state.items() if key not in state}
            record["state"] = {"values": values, "sha256": sha256_of_bytes(files[STATE_TENSORS]) if state else ""}
        files[NATIVE] = json_bytes(record)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (*stale, *(name for name, content in files.items() if not content)):  # of an adapter that was here before
            (directory / name).unlink(missing_ok=True)
        for name, content in files.items():
            if content:
                replace_file(directory / name, content)
    except OSError as error:
        raise FileFormatError(f"{directory}: cannot be written: {error.strerror}") from error


def _serialized(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save as serialize

    return serialize({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, metadata={"format": "pt"})


def _named_tensors(contents: Contents) -> dict[str, Tensor]:
    peft = contents.method.peft
    prefix = peft_names.PREFIX if peft else ""
    whole = contents.trained | (contents.also_saved if peft else {})
    tensors = {f"{prefix}{module}.{key}": tensor for module, state in whole.items() for key, tensor in state.items()}
    for saved in contents.sites:
        named = peft.to_tensors(saved.site, saved.config, saved.params, contents.config) if peft else saved.params
        tensors.update({f"{prefix}{saved.site.name}.{suffix}": tensor for suffix, tensor in named.items()})
    return tensors


def _peft_config(contents: Contents) -> dict[str, Any]:
    peft = contents.method.peft
    assert peft is not None
    names = [saved.site.name for saved in contents.sites]
    free = [module for module in contents.modules or () if not peft_names.in_saved_module({"modules_to_save": contents.also_train}, module)]
    return {
        "base_model_name_or_path": contents.base,
        "task_type": None,
        "inference_mode": True,
        "target_modules": peft_names.targets(names, free) if contents.modules is not None else sorted(names),
        "modules_to_save": sorted(contents.also_train) or None,
        **peft.document([(saved.site, saved.config) for saved in contents.sites], contents.config),
    }


def _record(contents: Contents, file: str, data: bytes) -> dict[str, Any]:
    info = registry().info(contents.method.name)
    return {
        "format": FORMAT,
        "torchgraft": __version__,
        "method": {"name": contents.method.name, "distribution": info.distribution, "version": info.version},
        "config": contents.config.model_dump(),
        "sites": [_site_record(saved, contents.config) for saved in contents.sites],
        "also_train": list(contents.also_train),
        "also_saved": list(contents.also_saved),
        "base": contents.base,
        **({"shared": dict(contents.shared)} if contents.shared else {}),
        **({"quantized": dict(contents.quantized)} if contents.quantized else {}),
        "tensors": {"file": file, "sha256": sha256_of_bytes(data)},
    }


def _site_record(saved: SavedSite, default: Config) -> dict[str, Any]:
    own, common = saved.config.model_dump(), default.model_dump()
    return {
        "name": saved.site.name,
        "kind": saved.site.kind.stored_as or saved.site.kind.name,
        "shape": list(saved.site.shape),
        "dtype": saved.site.dtype,
        "bias": saved.site.has_bias,
        "groups": saved.site.groups,
        "config": {key: value for key, value in own.items() if value != common[key]},
        "fingerprint": saved.fingerprint,
        **({"beneath": list(saved.beneath)} if saved.beneath else {}),
        **({"quantization": dict(saved.site.quantization)} if saved.site.quantization else {}),
    }
