"""Write an adapter directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchgraft.adapter_files import peft_names
from torchgraft.adapter_files.peft_config import meaning
from torchgraft.adapter_files.reading import NATIVE, NATIVE_TENSORS, PEFT_CONFIG, PEFT_TENSORS, STATE_TENSORS
from torchgraft.adapter_files.record import FORMAT
from torchgraft.disk import json_bytes, replace_file
from torchgraft.errors import FileFormatError
from torchgraft.hashes import sha256_of_bytes
from torchgraft.method.config import Config
from torchgraft.method.method import Method
from torchgraft.method.site import Site
from torchgraft.plugin.registry import registry
from torchgraft.version import __version__

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SavedSite:
    """One site of an adapter that is written."""

    site: Site
    config: Config
    params: Mapping[str, Tensor]
    fingerprint: str
    """Fingerprint of the base weight; empty if it is unknown."""
    beneath: Sequence[str] = ()
    """Names of the earlier adapters on the layer, for a method that depends on the weight."""


@dataclass(frozen=True)
class Contents:
    """Everything that is written to an adapter directory."""

    method: Method
    config: Config
    sites: list[SavedSite]
    trained: dict[str, Mapping[str, Tensor]]
    """Fully trained module → its state."""
    also_train: tuple[str, ...]
    """Names of the fully trained modules as the user gave them."""
    also_saved: dict[str, Mapping[str, Tensor]]
    """Further modules, with their states in the base, that PEFT expects because their names end like a fully trained one's."""
    modules: list[str] | None
    """Names of all modules of the base; None if unknown."""
    base: str | None
    """Name or path of the base, as the user gave it."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """State that the method stores between its steps."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Digests of the tensors that the sites share."""
    quantized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further layers of the base that were quantized during training, and how."""


def also_saved(also_train: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return the modules outside `also_train` that PEFT expects in the file, too."""
    return [name for name in peft_names.saved_modules(also_train, modules) if name not in also_train]


def write(contents: Contents, directory: Path, *, native: bool = True) -> None:
    """Write the tensors, PEFT's config if PEFT knows the method, and last the record, which has the tensors' hash.

    Args:
        native: whether the record and the method's state are written; without them the directory is as PEFT writes it.

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
        for name in (*stale, *(name for name, content in files.items() if not content)):  # files of an earlier adapter
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
    prefix = peft_names.prefix(peft)
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
