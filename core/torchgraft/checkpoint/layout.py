"""Lay out the tensors of an output (file, byte offset, dtype) without torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torchgraft.checkpoint.header import Header, TensorEntry, dump_header
from torchgraft.checkpoint.packed import convertible
from torchgraft.checkpoint.reading import INDEX, Checkpoint
from torchgraft.disk import read_json
from torchgraft.dtypes import BITS, nbytes
from torchgraft.errors import FileFormatError


@dataclass(frozen=True)
class Placed:
    """One tensor of the output: its source and its place."""

    name: str
    source: str
    """Name of the checkpoint's tensor that it is computed from; it differs only for an added tensor."""
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Byte offset in the output file."""

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class OutputFile:
    """One weight file of the output."""

    name: str
    """Path relative to the output directory, with slashes."""
    header: bytes
    tensors: tuple[Placed, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Layout:
    """All weight files of the output."""

    files: tuple[OutputFile, ...]
    index: dict[str, Any]
    """Contents of a new index file; empty if none is needed or the checkpoint's own stays valid."""
    is_new: bool
    """Whether files, names or headers differ from the checkpoint's."""

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def tensors(self) -> Iterator[Placed]:
        return (tensor for file in self.files for tensor in file.tensors)


def plan_layout(checkpoint: Checkpoint, *, dtype: str = "", max_shard_size: int = 0, added: Mapping[str, str] | None = None) -> Layout:
    """The checkpoint's own files and headers, unless an option asks for others.

    Args:
        dtype: for every tensor that may change it (see `packed.convertible`); empty: each its own.
        max_shard_size: bytes of a file; a tensor that is larger has a file of its own. 0: the checkpoint's own files.
        added: name of a new tensor → the tensor that it is a copy of.

    Raises:
        FileFormatError: other files are needed, and the checkpoint has a tensor in two shards.
    """
    if not (dtype or max_shard_size or added):
        return Layout(tuple(same_file(relative_name(checkpoint, header), header) for header in checkpoint.headers), {}, is_new=False)
    if checkpoint.shadowed:
        raise FileFormatError(
            f"{checkpoint.root}: {len(checkpoint.shadowed)} tensors are in two shards ({min(checkpoint.shadowed)}…), so its files can only "
            "be kept as they are: no other dtype, shard size or untied weights; save it again with save_pretrained(…)"
        )
    converted = convertible(checkpoint.tensors.values()) if dtype else frozenset()
    shards = [list(_entries(header, dtype, converted, added or {})) for header in checkpoint.headers]
    names = [relative_name(checkpoint, header) for header in checkpoint.headers]
    metadata = [header.metadata for header in checkpoint.headers]
    if max_shard_size:
        shards = list(_filled((entry for shard in shards for entry in shard), max_shard_size))
        names = _shard_names(checkpoint.stem, len(shards))
        metadata = [metadata[0]] * len(shards)
    files = tuple(_file(name, shard, meta) for name, shard, meta in zip(names, shards, metadata, strict=True))
    return Layout(files, _index(checkpoint, files), is_new=True)


def _shard_names(stem: str, count: int) -> list[str]:
    return [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [f"{stem}.safetensors"]


def relative_name(checkpoint: Checkpoint, header: Header) -> str:
    return header.path.relative_to(checkpoint.directory).as_posix()


def same_file(name: str, header: Header) -> OutputFile:
    """Return the file `name` with exactly this header."""
    tensors = tuple(Placed(entry.name, entry.name, entry.dtype, entry.shape, entry.begin) for entry in header.in_file_order)
    return OutputFile(name, header.raw, tensors)


def _entries(header: Header, dtype: str, converted: Container[str], added: Mapping[str, str]) -> Iterator[tuple[str, TensorEntry, str]]:
    """Yield (name, source, dtype) of every tensor; an added tensor follows its source."""
    for entry in header.in_file_order:
        names = [entry.name, *(name for name, source in added.items() if source == entry.name)]
        for name in names:
            yield name, entry, dtype if entry.name in converted else entry.dtype


def _filled(entries: Iterable[tuple[str, TensorEntry, str]], limit: int) -> Iterator[list[tuple[str, TensorEntry, str]]]:
    """Split the entries, in order, into lists of at most `limit` bytes."""
    shard: list[tuple[str, TensorEntry, str]] = []
    size = 0
    for name, entry, dtype in entries:
        length = nbytes(dtype, entry.shape)
        if shard and size + length > limit:
            yield shard
            shard, size = [], 0
        shard.append((name, entry, dtype))
        size += length
    if shard:
        yield shard


def _file(name: str, shard: list[tuple[str, TensorEntry, str]], metadata: dict[str, str]) -> OutputFile:
    # Wider types first, as the safetensors library writes them, so that every tensor is aligned.
    shard = sorted(shard, key=lambda item: -BITS[item[2]])
    header = dump_header({name: (dtype, entry.shape) for name, entry, dtype in shard}, metadata)
    begin, tensors = len(header), []
    for own, entry, dtype in shard:
        tensors.append(Placed(own, entry.name, dtype, entry.shape, begin))
        begin += tensors[-1].nbytes
    return OutputFile(name, header, tuple(tensors))


def _index(checkpoint: Checkpoint, files: tuple[OutputFile, ...]) -> dict[str, Any]:
    if [file.name for file in files] == _shard_names(checkpoint.stem, 1) or (not checkpoint.root.is_dir() and len(files) == 1):
        return {}
    old = read_json(checkpoint.directory / (checkpoint.index or INDEX), missing_ok=True).get("metadata")
    tensors = [tensor for file in files for tensor in file.tensors]
    totals = {"total_size": sum(tensor.nbytes for tensor in tensors), "total_parameters": sum(prod(tensor.shape) for tensor in tensors)}
    return {
        "metadata": {**(old if isinstance(old, dict) else {}), **totals},
        "weight_map": {tensor.name: file.name for file in files for tensor in file.tensors},
    }
