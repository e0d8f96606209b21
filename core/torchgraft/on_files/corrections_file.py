"""The corrections of a merge in one safetensors file, written in any order and read tensor by tensor.

NAME#blocks            int64 (blocks, 4): for each block of canonical rows, its last row + 1 and the lengths of its three parts
NAME#gap, #step, #wide the parts of all blocks' corrections, concatenated (see `exact.Correction`)
NAME#needed.N.KEY      what the method of the Nth adapter on this tensor asked for, by its hook adapter_undo
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from torchgraft import dtypes
from torchgraft.arithmetic import exact
from torchgraft.arithmetic.exact import Correction, Numbers
from torchgraft.checkpoint.header import dump_header
from torchgraft.checkpoint.reading import Checkpoint, open_checkpoint
from torchgraft.errors import FileFormatError
from torchgraft.hashes import as_bytes
from torchgraft.rewriting.file_tensors import FileTensor, copy_bytes

FilePlace = tuple[str, tuple[int, ...], int]
"""(dtype, shape, first byte) of a tensor."""


class Corrections:
    """Collects the corrections of one tensor, block by block, in a few large buffers, because many small ones would fragment memory."""

    def __init__(self) -> None:
        self.blocks: list[list[int]] = []
        self.parts: dict[str, tuple[str, bytearray]] = {}
        """Label → dtype and data."""

    def append(self, rows: slice, correction: Correction) -> None:
        parts = {"gap": correction.gap, "step": correction.step, "wide": correction.wide}
        self.blocks.append([rows.stop, *(part.size for part in parts.values())])
        for label, part in parts.items():
            if label not in self.parts:
                self.parts[label] = part.dtype.name, bytearray()
            self.parts[label][1].extend(part.data)


@dataclass(frozen=True)
class TensorUndo:
    """What restores one tensor: the corrections of its blocks, and the tensors that the methods stored."""

    blocks: Sequence[tuple[slice, Correction]]
    needed: Sequence[dict[str, Tensor]]
    """For each adapter on it, the tensors of `adapter_undo`."""


class UndoWriter(ExitStack):
    """Writes corrections, which any thread adds in any order. `finish` sorts them by name and writes the header in front."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._data = path, path.with_suffix(".data")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.enter_context(self._data.open("wb"))
        self._lock = Lock()
        self._places: dict[str, FilePlace] = {}

    def add(self, name: str, corrections: Corrections, needed: Sequence[dict[str, Tensor]]) -> None:
        blocks = torch.tensor(corrections.blocks, dtype=torch.int64).reshape(-1, 4)
        with self._lock:
            self._write(f"{name}#blocks", "int64", tuple(blocks.shape), as_bytes(blocks))
            for label, (dtype, data) in corrections.parts.items():
                self._write(f"{name}#{label}", dtype, (len(data) // dtypes.SIZES[dtype],), memoryview(data))
            for number, tensors in enumerate(needed):
                for key, tensor in tensors.items():
                    self._write(f"{name}#needed.{number}.{key}", dtypes.name_of(tensor.dtype), tuple(tensor.shape), as_bytes(tensor))

    def finish(self) -> None:
        self._file.flush()
        names = sorted(self._places)
        header = dump_header({name: self._places[name][:2] for name in names}, {"format": "pt"})
        with self._data.open("rb") as source, self._path.open("wb", buffering=0) as target:
            target.write(header)
            begin = len(header)
            for name in names:
                dtype, shape, at = self._places[name]
                here = FileTensor(source.fileno(), at, shape, dtype, str(self._data))
                for nbytes in copy_bytes(here, FileTensor(target.fileno(), begin, shape, dtype, str(self._path))):
                    begin += nbytes
        self._data.unlink()

    def _write(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        self._places[name] = dtype, shape, self._file.tell()
        self._file.write(data)


class UndoReader:
    """Reads the corrections of one tensor at a time.

    Raises:
        FileFormatError: the file is missing or broken.
    """

    def __init__(self, path: Path) -> None:
        self._checkpoint: Checkpoint = open_checkpoint(path)
        self._path = path
        self.names = frozenset(key.removesuffix("#blocks") for key in self._checkpoint.tensors if key.endswith("#blocks"))
        self._needed: dict[str, list[tuple[int, str, str]]] = {}
        for key in self._checkpoint.tensors:
            name, _, rest = key.partition("#needed.")
            number, _, own = rest.partition(".")
            if own and number.isdecimal() and len(number) < 9:
                self._needed.setdefault(name, []).append((int(number), own, key))

    def read(self, name: str, adapters: int, rows: int, tallest: int, stored: torch.dtype) -> TensorUndo:
        """Read the corrections of one tensor.

        Args:
            adapters: number of adapters on it.
            rows: its canonical rows, which the blocks must cover.
            tallest: the most rows that one block may have.
            stored: its dtype in the base.
        """
        expected = {"blocks": "int64", "gap": "uint8", "step": "int8", "wide": dtypes.name_of(exact.BITS[stored.itemsize])}
        try:
            for label, dtype in expected.items():
                entry = self._checkpoint.tensors[f"{name}#{label}"]
                if entry.dtype != dtype or len(entry.shape) != 1 + (label == "blocks") or entry.shape[1:] not in ((), (4,)):
                    raise ValueError
            table, gap, step, wide = (self._checkpoint.read(f"{name}#{label}").numpy() for label in expected)
            blocks = list(_cut(table.tolist(), gap, step, wide, rows, tallest))
            needed: list[dict[str, Tensor]] = [{} for _ in range(adapters)]
            for number, own, key in self._needed.get(name, []):
                needed[number][own] = self._checkpoint.read(key)
        except (KeyError, IndexError, ValueError):
            raise FileFormatError(f"{self._path}: the data of {name!r} is incomplete or wrong; copy the merged directory again") from None
        return TensorUndo(blocks, needed)


def _cut(
    table: Sequence[Sequence[int]], gap: Numbers, step: Numbers, wide: Numbers, rows: int, tallest: int
) -> Iterator[tuple[slice, Correction]]:
    """Yield each block of rows and its correction.

    Raises:
        ValueError: the blocks do not cover the rows one after the other, or have other parts than the file.
    """
    if (table[-1][0] if table else 0) != rows:
        raise ValueError
    first, places = 0, [0, 0, 0]
    for last, *lengths in table:
        ends = [place + length for place, length in zip(places, lengths, strict=True)]
        if (
            not first < last <= first + tallest
            or min(lengths) < 0
            or any(end > len(part) for end, part in zip(ends, (gap, step, wide), strict=True))
        ):
            raise ValueError
        yield (
            slice(first, last),
            Correction(*(part[begin:end] for part, begin, end in zip((gap, step, wide), places, ends, strict=True))),
        )
        first, places = last, ends
    if places != [len(gap), len(step), len(wide)]:
        raise ValueError
