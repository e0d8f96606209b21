"""Verify a merge: read it back, and compare merged weights with the methods' formulas in float64, and copies with the base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from torchgraft.checkpoint.fingerprint import runs
from torchgraft.checkpoint.layout import OutputFile, Placed
from torchgraft.checkpoint.reading import open_checkpoint
from torchgraft.errors import MergeError
from torchgraft.kinds.kind import Kind
from torchgraft.on_files.merge_run import MergeRun, jobs
from torchgraft.rewriting.file_tensors import FileTensor, has_contiguous_rows, read_exactly
from torchgraft.rewriting.workers import Workers, opened

PLACES, ROWS, ENTRIES = 8, 8, 1024
"""Number of blocks, and of rows in each, that are read of a merged tensor, the first and last included; entries of one without rows."""

CHECKED = (
    f"every header; up to {PLACES * ROWS} rows of each merged tensor against the method's formula in float64; "
    "up to 256 entries of each copied tensor against the base"
)


def verify_merge(run: MergeRun, directory: Path) -> None:
    """Verify the merge in `directory`.

    Raises:
        MergeError: a tensor differs from its reference.
        FileFormatError: the output is not a valid checkpoint.
    """
    _check_headers(run, directory)

    def work(job: tuple[OutputFile, Placed]) -> str:
        file, placed = job
        with opened(run.plan.checkpoint, directory, file, placed) as (source, target):
            right = _is_same(source, target) if run.plan.is_copied(placed) else _is_expected(run, placed, source, target)
        return "" if right else placed.name

    with closing(Workers().map(work, jobs(run.plan))) as results:
        for wrong in results:
            if wrong:
                raise MergeError(
                    f"{wrong}: verification failed: the written values do not match the reference (disk or arithmetic error). "
                    "Nothing was written"
                )


def _check_headers(run: MergeRun, directory: Path) -> None:
    single = run.plan.layout.files[0].name if not run.plan.checkpoint.root.is_dir() and len(run.plan.layout.files) == 1 else ""
    found = open_checkpoint(directory / single).tensors
    for _, placed in jobs(run.plan):
        entry = found.get(placed.name)
        if entry is None or (entry.dtype, entry.shape, entry.begin) != (placed.dtype, placed.shape, placed.begin):
            raise MergeError(f"{placed.name}: the header that was written does not describe it. Nothing was left behind")


def _is_same(source: FileTensor, target: FileTensor) -> bool:
    size = source.dtype.itemsize
    return all(
        _bytes(source, first * size, end * size) == _bytes(target, first * size, end * size) for first, end in runs(source.nbytes // size)
    )


def _is_expected(run: MergeRun, placed: Placed, source: FileTensor, target: FileTensor) -> bool:
    merge = run.tensor_merge(placed, source)
    originals, found = _Rows(source, merge.kind), _Rows(target, merge.kind)
    height = ROWS if merge.kind is not None else ENTRIES
    whole = [slice(0, len(originals))] if len(originals) else []
    for rows in _sample(placed.name, len(originals), height) if merge.by_rows else whole:
        expected, lost = merge.expected(originals[rows], rows)
        written = found[rows].double()
        right = ((written - expected).abs() <= lost) | (written == expected) | (written.isnan() & expected.isnan())
        if not right.all():
            return False
    return True


class _Rows:
    """The canonical rows of a weight in a file, by slices."""

    def __init__(self, file: FileTensor, kind: Kind | None) -> None:
        self._file = file
        self._columns = 1 if kind is None else kind.canonical_shape(file.shape)[1]
        self._mapped = None if kind is None or has_contiguous_rows(kind, file.shape) else kind.to_canonical(file.mapped(written=False))

    def __len__(self) -> int:
        return self._file.nbytes // self._file.dtype.itemsize // max(1, self._columns)

    def __getitem__(self, rows: slice) -> Tensor:
        if self._mapped is not None:
            return self._mapped[rows]
        width = self._columns * self._file.dtype.itemsize
        data = _bytes(self._file, rows.start * width, rows.stop * width)
        return torch.frombuffer(data, dtype=self._file.dtype).reshape(-1, self._columns)


def _sample(name: str, rows: int, height: int) -> Iterator[slice]:
    """`height` rows at each of a few places: the first, the last, and others that the name decides."""
    last = max(0, rows - height)
    seed = hashlib.sha256(name.encode()).digest()
    places = {0, last, *(int.from_bytes(seed[4 * i : 4 * i + 4], "little") % (last + 1) for i in range(PLACES - 2))}
    return (slice(first, min(first + height, rows)) for first in sorted(places) if rows)


def _bytes(file: FileTensor, begin: int, end: int) -> bytearray:
    data = bytearray(end - begin)
    read_exactly(file, memoryview(data), begin)
    return data
