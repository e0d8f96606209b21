"""Open a checkpoint: one safetensors file, or a directory with one, or with shards and an index. No tensor is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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

STEM = "model"
"""Start of the names of transformers' weight files; diffusers has others."""
WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = STEM + INDEX_SUFFIX


@dataclass(frozen=True)
class Checkpoint:
    """The headers and config of a checkpoint. `root` is the directory, or the file itself if a file was given."""

    root: Path
    headers: tuple[Header, ...]
    config: dict[str, Any]
    """Contents of config.json, or empty."""
    index: str = ""
    """Name of the index file; empty if there is none."""
    shadowed: frozenset[str] = frozenset()
    """Tensors that the index takes from another shard, under names of their own (see `obey`). They are stored, and nothing loads them."""

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        return {name: entry for header in self.headers for name, entry in header.tensors.items()}

    @cached_property
    def file_of(self) -> dict[str, Path]:
        return {name: header.path for header in self.headers for name in header.tensors}

    @property
    def stem(self) -> str:
        """Start of the names of the weight files and of the index."""
        return self.index.removesuffix(INDEX_SUFFIX) or STEM

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

    if entry.dtype not in dtypes.SIZES:
        raise FileFormatError(f"{file.name}: tensor {entry.name!r} has the type {entry.dtype}, which torch does not have")
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
        return _open_directory(root, read_json(root / "config.json", missing_ok=True))
    if root.suffix != WEIGHTS_SUFFIX:
        raise FileFormatError(f"{root}: not a .safetensors file; give a checkpoint directory or a .safetensors file")
    return Checkpoint(root, (read_header(root),), read_json(root.parent / "config.json", missing_ok=True))


def _open_directory(root: Path, config: dict[str, Any]) -> Checkpoint:
    # transformers also prefers the single file to the index.
    if (root / f"{STEM}{WEIGHTS_SUFFIX}").exists():
        return Checkpoint(root, (read_header(root / f"{STEM}{WEIGHTS_SUFFIX}"),), config)
    indices = [root / INDEX] if (root / INDEX).exists() else sorted(root.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) == 1:
        headers, shadowed = _headers_of_index(indices[0])
        return Checkpoint(root, headers, config, indices[0].name, shadowed)
    return Checkpoint(root, (read_header(_only_file(root)),), config)


def _only_file(root: Path) -> Path:
    files = sorted(root.glob(f"*{WEIGHTS_SUFFIX}"))
    if [file.name for file in files] == ["adapter_model.safetensors"]:
        raise FileFormatError(f"{root}: this is an adapter directory; the base model is needed here")
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise FileFormatError(f"{root}: {len(files)} .safetensors files ({names}…) and no {INDEX} that lists them; give one file")
    if any(root.glob("*.bin")):
        raise FileFormatError(
            f"{root}: its weights are .bin files, which are pickles; save it again with save_pretrained(…), which writes safetensors"
        )
    raise FileFormatError(f"{root}: no .safetensors file in this directory")


def read_index(index: Path) -> dict[str, str]:
    """Return tensor → shard, as the index file states it.

    Raises:
        FileFormatError: it states something else.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise FileFormatError(f"{index}: it has no weight_map from tensor names to file names")
    return weight_map


def _headers_of_index(index: Path) -> tuple[tuple[Header, ...], frozenset[str]]:
    weight_map, headers = read_index(index), list[Header]()
    for shard in sorted(set(weight_map.values())):
        if leaves_directory(shard):
            raise FileFormatError(f"{index}: the shard {shard!r} is outside the directory; refused")
        if not _is_file(index.parent / shard):
            raise FileFormatError(f"{index}: the shard {shard!r} is missing; download or copy it again")
        headers.append(obey(weight_map, shard, read_header(index.parent / shard)))
    return tuple(headers), _shadowed(index, weight_map, headers)


def obey(weight_map: Mapping[str, str], shard: str, header: Header) -> Header:
    """Return the header of `shard`, in which a tensor that the index takes from another shard is called NAME@SHARD.

    So every tensor has a name of its own. A tensor that the index does not list keeps its name.
    """
    own = {name: name if weight_map.get(name, shard) == shard else f"{name}@{shard}" for name in header.tensors}
    return replace(header, tensors={new: header.tensors[name]._replace(name=new) for name, new in own.items()})


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is longer than the system allows
        return False


def _shadowed(index: Path, weight_map: Mapping[str, str], headers: Iterable[Header]) -> frozenset[str]:
    """Check the headers against the index, and return the names of the tensors that it takes from elsewhere.

    Raises:
        FileFormatError: a tensor is not where the index lists it, or it lists one in two shards.
    """
    found: dict[str, str] = {}
    for header in headers:
        shard = header.path.relative_to(index.parent).as_posix()
        for name in header.tensors:
            if name in found:
                raise FileFormatError(f"{index}: tensor {name!r} is in two shards, {found[name]} and {shard}, and the index lists neither")
            found[name] = shard
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            raise FileFormatError(f"{index}: tensor {name!r} is missing from {shard!r}, where the index lists it")
    return frozenset(name for name, shard in found.items() if name.endswith(f"@{shard}") and name.removesuffix(f"@{shard}") in weight_map)


def became_shorter(where: str | Path) -> FileFormatError:
    return FileFormatError(f"{where}: the file became shorter while it was read")
