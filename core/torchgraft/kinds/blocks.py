"""A weight as blocks of rows: what a merge works on at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchgraft.kinds.kind import Kind

ENTRIES = {"cpu": 1 << 18, "other": 1 << 26}
"""Of a weight that are worked on at a time: on a CPU, few enough for its cache, and enough that calls do not count."""


class Blocks(Protocol):
    """A stored weight, read and written by blocks of canonical rows."""

    @property
    def rows(self) -> Sequence[slice]:
        """All of them, one block after the other."""

    def read(self, rows: slice) -> Tensor:
        """The stored rows, canonical, in the weight's own type. Valid until the next call."""

    def write(self, rows: slice, matrix: Tensor) -> None:
        """The new rows, canonical, in the output's type."""


class MemoryBlocks:
    """Blocks of a tensor in memory, or in a file that is mapped to it. `rows` is one block if the whole is needed at once."""

    def __init__(self, kind: Kind, source: Tensor, target: Tensor, *, by_rows: bool = True) -> None:
        self._kind, self._target = kind, target
        self._source, self._result = kind.to_canonical(source), kind.to_canonical(target)
        self._in_place = self._result.data_ptr() == target.data_ptr()  # else the kind made a copy
        rows, columns = self._source.shape
        self.rows = row_blocks(rows, columns, source.device) if by_rows else [slice(0, rows)]

    def read(self, rows: slice) -> Tensor:
        return self._source[rows]

    def write(self, rows: slice, matrix: Tensor) -> None:
        self._result[rows] = matrix
        if not self._in_place and rows.stop == len(self._source):
            self._target.copy_(self._kind.from_canonical(self._result, tuple(self._target.shape)))


def row_blocks(rows: int, columns: int, device: torch.device | None = None) -> list[slice]:
    """Consecutive blocks of rows, each of at least one row."""
    entries = ENTRIES["cpu" if device is None or device.type == "cpu" else "other"]
    height = max(1, entries // max(1, columns))
    return [slice(first, min(first + height, rows)) for first in range(0, rows, height)]
