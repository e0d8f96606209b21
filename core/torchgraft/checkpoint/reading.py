"""Open a checkpoint: one safetensors file, or a directory with one, or with shards and an index. No tensor is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from torchgraft import dtypes
from torchgraft.checkpoint.header import Header, TensorEntry, read_header
from torchgraft.checkpoint.hub import locate
from torchgraft.disk import leaves_directory, read_json
from torchgraft.errors import FileFormatError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The headers and config of a checkpoint. `root` is the directory, or the file itself if a file was given."""

    root: Path
    headers: tuple[Header, ...]
    config: dict[str, Any]
    """Contents of config.json, or empty."""

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        return {name: entry for header in self.headers for name, entry in header.tensors.items()}

    @cached_property
    def file_of(self) -> dict[str, Path]:
        return {name: header.path for header in self.headers for name in header.tensors}

    @property
    def directory(self) -> Path:
        return self.root if self.root.is_dir() else self.root.parent

    def read(self, name: str) -> Tensor:
        """Read one tensor into new memory."""
        with self.file_of[name].open("rb") as file:
            return read_tensor(file, self.tensors[name])


def read_tensor(file: BinaryIO, entry: TensorEntry) -> Tensor:
    """Read the tensor that `entry` describes from an open file."""
    import torch

    dtype = dtypes.torch_dtype(entry.dtype)
    if entry.numel == 0:
        return torch.empty(entry.shape, dtype=dtype)
    data = bytearray(entry.end - entry.begin)
    file.seek(entry.begin)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]  # every file opened with "rb" has it
        raise became_shorter(f"{file.name}: tensor {entry.name!r}")
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Read every header of `source`: a directory, a .safetensors file, or a hub id in the local cache.

    Raises:
        FileFormatError: the source does not exist, or is broken.
    """
    root = locate(source)
    if root.is_dir():
        headers = _headers_of_directory(root)
        return Checkpoint(root, headers, read_json(root / "config.json", missing_ok=True))
    if root.suffix != ".safetensors":
        raise FileFormatError(f"{root}: not a .safetensors file; give a checkpoint directory or a .safetensors file")
    return Checkpoint(root, (read_header(root),), read_json(root.parent / "config.json", missing_ok=True))


def _headers_of_directory(root: Path) -> tuple[Header, ...]:
    # transformers also prefers the single file to the index.
    if (root / WEIGHTS).exists():
        return (read_header(root / WEIGHTS),)
    if (root / INDEX).exists():
        return _headers_of_index(root / INDEX)
    files = sorted(root.glob("*.safetensors"))
    if [file.name for file in files] == ["adapter_model.safetensors"]:
        raise FileFormatError(f"{root}: this is an adapter directory; the base model is needed here")
    if len(files) == 1:
        return (read_header(files[0]),)
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise FileFormatError(f"{root}: {len(files)} .safetensors files ({names}…) and no {INDEX} that lists them; give one file")
    if any(root.glob("*.bin")):
        raise FileFormatError(
            f"{root}: its weights are .bin files, which are pickles; save it again with save_pretrained(…), which writes safetensors"
        )
    raise FileFormatError(f"{root}: no .safetensors file in this directory")


def _headers_of_index(index: Path) -> tuple[Header, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise FileFormatError(f"{index}: it has no weight_map from tensor names to file names")
    headers = []
    for shard in sorted(set(weight_map.values())):
        if leaves_directory(shard):
            raise FileFormatError(f"{index}: the shard {shard!r} is outside the directory; refused")
        if not _is_file(index.parent / shard):
            raise FileFormatError(f"{index}: the shard {shard!r} is missing; download or copy it again")
        headers.append(read_header(index.parent / shard))
    _check_index(index, weight_map, headers)
    return tuple(headers)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is longer than the system allows
        return False


def _check_index(index: Path, weight_map: dict[str, str], headers: list[Header]) -> None:
    found: dict[str, str] = {}
    for header in headers:
        shard = header.path.relative_to(index.parent).as_posix()
        for name in header.tensors:
            if name in found:
                raise FileFormatError(f"{index}: tensor {name!r} is in two shards, {found[name]} and {shard}")
            found[name] = shard
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            raise FileFormatError(f"{index}: tensor {name!r} is missing from {shard!r}, where the index lists it")
    for name in found.keys() - weight_map.keys():
        raise FileFormatError(f"{index}: tensor {name!r} is in {found[name]!r}, and the index does not list it")


def became_shorter(where: str | Path) -> FileFormatError:
    return FileFormatError(f"{where}: the file became shorter while it was read")
