"""Blocks of rows of a weight, which a merge works on one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchgraft.kinds.kind import Kind

ENTRIES = {"cpu": 1 << 18, "other": 1 << 26}
"""Entries of a weight in one block: on a CPU, few enough for its cache, and enough that the cost of calls is small."""


class Blocks(Protocol):
    """A stored weight, read and written by blocks of canonical rows."""

    @property
    def rows(self) -> Sequence[slice]:
        """All rows of the weight, as consecutive blocks."""

    def read(self, rows: slice) -> Tensor:
        """Return rows of the weight in the canonical layout (out, in) and in its own dtype. The next call of `read` may overwrite them."""

    def write(self, rows: slice, matrix: Tensor) -> None:
        """Replace these rows by `matrix`, which has the canonical layout (out, in) and the dtype of the output file."""


class MemoryBlocks:
    """Blocks of a tensor in memory, or in a memory-mapped file. Without `by_rows` there is one block of all rows."""

    def __init__(self, kind: Kind, source: Tensor, target: Tensor, *, by_rows: bool = True) -> None:
        self._kind, self._target = kind, target
        self._source, self._result = kind.to_canonical(source), kind.to_canonical(target)
        self._in_place = self._result.data_ptr() == target.data_ptr()  # else the kind returned a copy
        rows, columns = self._source.shape
        self.rows = row_blocks(rows, columns, source.device) if by_rows else [slice(0, rows)]

    def read(self, rows: slice) -> Tensor:
        return self._source[rows]

    def write(self, rows: slice, matrix: Tensor) -> None:
        self._result[rows] = matrix
        if not self._in_place and rows.stop == len(self._source):
            self._target.copy_(self._kind.from_canonical(self._result, tuple(self._target.shape)))


def row_blocks(rows: int, columns: int, device: torch.device | None = None) -> list[slice]:
    """Return consecutive blocks of rows, each of at least one row."""
    entries = ENTRIES["cpu" if device is None or device.type == "cpu" else "other"]
    height = max(1, entries // max(1, columns))
    return [slice(first, min(first + height, rows)) for first in range(0, rows, height)]
