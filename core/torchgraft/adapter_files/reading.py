"""Read and check an adapter directory without importing torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchgraft import dtypes
from torchgraft.adapter_files import peft_names
from torchgraft.adapter_files.peft_config import check_peft_config, meaning
from torchgraft.adapter_files.record import AdapterRecord, SiteRecord, parse_record
from torchgraft.checkpoint.header import Header, read_header
from torchgraft.checkpoint.hub import locate
from torchgraft.checkpoint.reading import read_tensor
from torchgraft.disk import read_json
from torchgraft.errors import FileFormatError
from torchgraft.hashes import sha256_of_file

if TYPE_CHECKING:
    from torch import Tensor

NATIVE = "torchgraft.json"
PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
NATIVE_TENSORS = "torchgraft.safetensors"
STATE_TENSORS = "torchgraft_state.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter directory."""

    directory: Path
    record: AdapterRecord | None
    """Contents of torchgraft.json; None for an adapter that PEFT wrote."""
    peft: dict[str, Any]
    """Contents of adapter_config.json; empty for a method that PEFT does not know."""
    tensor_file: Path
    names: Mapping[str, str] = field(default_factory=dict)
    """Name of each tensor → its name in the file; empty if all are the same."""

    def unwrapped(self) -> AdapterFiles | None:
        """Return the same files with the names that PEFT's save_pretrained writes (see `peft_names.unwrapped`); None if they have them."""
        names = {peft_names.unwrapped(name): name for name in self.shapes}
        if self.record or len(names) < len(self.shapes) or all(new == name for new, name in names.items()):
            return None
        return replace(self, names=names)

    @property
    def prefix(self) -> str:
        """Prefix of every tensor name in the file: PEFT's, or "" for a method that PEFT does not know."""
        return peft_names.prefix(self.peft)

    @property
    def base(self) -> str | None:
        """Name or path of the base, as recorded."""
        return (self.record.base if self.record else None) or self.peft.get("base_model_name_or_path")

    @cached_property
    def recorded_sites(self) -> dict[str, SiteRecord]:
        """Site name → its record; empty for an adapter that PEFT wrote."""
        return {site.name: site for site in self.record.sites} if self.record else {}

    @cached_property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name → (dtype, shape)."""
        if self.tensor_file.suffix == ".bin":
            found = {name: (dtypes.name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in self._pickled.items()}
        else:
            found = {name: (entry.dtype, entry.shape) for name, entry in self._header.tensors.items()}
        return {new: found[name] for new, name in self.names.items()} if self.names else found

    def read(self, name: str) -> Tensor:
        """Read one tensor by its name."""
        name = self.names.get(name, name)
        if self.tensor_file.suffix == ".bin":
            return self._pickled[name]
        with self.tensor_file.open("rb") as file:
            return read_tensor(file, self._header.tensors[name])

    def read_state(self) -> dict[str, Any]:
        """Read the state that the method stores between its steps.

        Raises:
            FileFormatError: the file of its tensors is missing, or is not the one that was saved.
        """
        state = self.record.state if self.record else None
        if state is None:
            return {}
        if not state.sha256:
            return dict(state.values)
        path = self.directory / STATE_TENSORS
        if not path.is_file() or sha256_of_file(path) != state.sha256:
            raise FileFormatError(f"{path}: this file is missing or is not the one that {NATIVE} describes; copy the whole directory again")
        with path.open("rb") as file:
            return {**state.values, **{name: read_tensor(file, entry) for name, entry in read_header(path).tensors.items()}}

    def read_all(self) -> dict[str, Tensor]:
        """Read all tensors, by their names."""
        if self.tensor_file.suffix == ".bin":
            found = self._pickled
        else:
            with self.tensor_file.open("rb") as file:
                found = {name: read_tensor(file, entry) for name, entry in self._header.tensors.items()}
        return {new: found[name] for new, name in self.names.items()} if self.names else found

    @cached_property
    def _header(self) -> Header:
        return read_header(self.tensor_file)

    @cached_property
    def _pickled(self) -> dict[str, Tensor]:
        import torch

        try:
            loaded = torch.load(self.tensor_file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for an unsafe or broken pickle
            raise FileFormatError(
                f"{self.tensor_file}: not readable as tensors only ({type(error).__name__}); save the adapter as safetensors"
            ) from error
        if not isinstance(loaded, Mapping) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
        ):
            raise FileFormatError(f"{self.tensor_file}: expected a map from names to tensors")
        return dict(loaded)


def read_adapter(directory: str | Path) -> AdapterFiles:
    """Read an adapter directory, torchgraft's or PEFT's.

    Raises:
        FileFormatError: it is not an adapter directory, or a file in it is missing or broken.
    """
    root = locate(directory)
    if not root.is_dir():
        raise FileFormatError(f"{root}: not a directory; give the adapter's directory{other_format([root])}")
    document = read_json(root / NATIVE, missing_ok=True)
    peft = read_json(root / PEFT_CONFIG, missing_ok=True)
    if not document and not peft:
        raise FileFormatError(
            f"{root}: not an adapter directory: it contains no {PEFT_CONFIG}{_elsewhere(root)}{other_format(root.glob('*.safetensors'))}"
        )
    record = parse_record(root / NATIVE, document) if document else None
    if "fine_tune_type" in peft:
        raise FileFormatError(
            f"{root}: an adapter in mlx-lm's format, which is not read; fuse it with 'mlx_lm.fuse', or convert it to PEFT's"
        )
    if peft:
        check_peft_config(root / PEFT_CONFIG, peft)
    names = [record.tensors.file] if record else [PEFT_TENSORS, PEFT_PICKLE]
    tensor_file = next((root / name for name in names if (root / name).is_file()), None)
    if tensor_file is None:
        raise FileFormatError(f"{root}: {' or '.join(names)} is missing")
    if record and sha256_of_file(tensor_file) != record.tensors.sha256:
        raise FileFormatError(
            f"{tensor_file}: not the file that {NATIVE} describes (the hashes differ); copy the whole directory again, or remove "
            f"{NATIVE} to read it as a plain PEFT adapter"
        )
    if record and peft and record.peft_config not in (None, meaning(peft)):
        raise FileFormatError(
            f"{root / PEFT_CONFIG}: this file changed after {NATIVE} was written, and the two describe different adapters; "
            f"undo the change, or remove {NATIVE} to read it as a plain PEFT adapter"
        )
    return AdapterFiles(root, record, peft, tensor_file)


def other_format(files: Iterable[Path]) -> str:
    """Return which other tool's LoRA format one of the files has, as the end of a message; empty if it has none."""
    for path in files:
        try:
            names = read_header(path).tensors
        except FileFormatError:
            continue
        for sign, tool in (
            (".lora_down.", "kohya's"),
            (".lora.down.", "diffusers' former"),
            (".lora_a", "mlx-lm's"),
            (".lora_A.", "diffusers'"),
        ):
            if any(sign in name for name in names):
                return f"; {path.name} is a LoRA in {tool} format, which is not read: convert it to PEFT's, with {PEFT_CONFIG}"
    return ""


def _elsewhere(root: Path) -> str:
    inside = sorted(path.parent.name for path in root.glob(f"*/{PEFT_CONFIG}"))
    return f"; it contains adapters: {', '.join(inside[:5])}" if inside else ""
