"""Weights in files as blocks of rows, read from one file and written to another."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from torchgraft import dtypes
from torchgraft.checkpoint.reading import became_shorter
from torchgraft.hashes import as_bytes
from torchgraft.kinds.blocks import Blocks, MemoryBlocks, row_blocks
from torchgraft.kinds.kind import Kind, Shape

NO_KERNEL_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""Error codes with which the kernel refuses to copy between these two files itself."""

COPIED = 1 << 26
"""Size of a copied chunk, in bytes. Progress is reported and cancellation checked between chunks."""


class FileBlocks:
    """Blocks of a weight whose canonical rows are contiguous in the file."""

    def __init__(self, source: FileTensor, target: FileTensor, columns: int, *, by_rows: bool = True) -> None:
        self._source, self._target, self._columns = source, target, columns
        rows = prod(source.shape) // max(1, columns)
        self.rows = row_blocks(rows, columns) if by_rows else [slice(0, rows)]
        self._buffer = bytearray()

    def read(self, rows: slice) -> Tensor:
        width = self._columns * self._source.dtype.itemsize
        length = (rows.stop - rows.start) * width
        if len(self._buffer) < length:
            self._buffer = bytearray(length)
        piece = memoryview(self._buffer)[:length]
        read_exactly(self._source, piece, rows.start * width)
        return torch.frombuffer(piece, dtype=self._source.dtype).reshape(-1, self._columns)

    def write(self, rows: slice, matrix: Tensor) -> None:
        write_exactly(self._target, as_bytes(matrix), rows.start * self._columns * self._target.dtype.itemsize)


class FileTensor:
    """A tensor's position, shape and dtype in an open file."""

    def __init__(self, descriptor: int, begin: int, shape: Shape, dtype: str, where: str) -> None:
        if dtype not in dtypes.SIZES:  # torch has no such type, and the bytes are only copied
            shape, dtype = (dtypes.nbytes(dtype, shape),), "uint8"
        self.descriptor, self.begin, self.shape, self.where = descriptor, begin, shape, where
        self.dtype = dtypes.torch_dtype(dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def mapped(self, *, written: bool) -> Tensor:
        """Map the tensor into memory. Its pages are loaded on access and may be evicted when memory is short."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        if written:
            _reserve(self.descriptor, self.begin, self.nbytes)
        elif os.fstat(self.descriptor).st_size < self.begin + self.nbytes:
            raise became_shorter(self.where)
        start = self.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        access = mmap.ACCESS_WRITE if written else mmap.ACCESS_COPY
        memory = mmap.mmap(self.descriptor, self.begin + self.nbytes - start, access=access, offset=start)
        flat = torch.frombuffer(memory, dtype=torch.uint8, offset=self.begin - start, count=self.nbytes)
        # A tensor may begin at any byte of a file, but torch needs it aligned to its dtype.
        return (flat if self.is_aligned else flat.clone()).view(self.dtype).reshape(self.shape)

    @property
    def is_aligned(self) -> bool:
        return self.begin % self.dtype.itemsize == 0


def _reserve(descriptor: int, begin: int, nbytes: int) -> None:
    """Allocate the space on the disk first, because a full disk would crash a write to mapped memory instead of raising an error."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, begin, nbytes)
        return
    for place in range(begin, begin + nbytes, 1 << 20):
        os.pwrite(descriptor, bytes(min(1 << 20, begin + nbytes - place)), place)


class MappedBlocks(MemoryBlocks):
    """Blocks of a weight whose canonical rows are not contiguous in the file, or that is processed as a whole."""

    def __init__(self, kind: Kind, source: FileTensor, target: FileTensor, *, by_rows: bool) -> None:
        self._file = target
        super().__init__(kind, source.mapped(written=False), target.mapped(written=True), by_rows=by_rows)

    def write(self, rows: slice, matrix: Tensor) -> None:
        super().write(rows, matrix)
        if rows.stop == len(self._source) and not self._file.is_aligned:
            write_exactly(self._file, as_bytes(self._target), 0)


def blocks_of(source: FileTensor, target: FileTensor, kind: Kind | None, *, by_rows: bool = True) -> Blocks:
    """Return the blocks of a tensor. Without a kind (no layer's weight) they are blocks of its flat entries."""
    if kind is None:
        return FileBlocks(source, target, 1, by_rows=by_rows)
    if by_rows and has_contiguous_rows(kind, source.shape):
        return FileBlocks(source, target, kind.canonical_shape(source.shape)[1])
    return MappedBlocks(kind, source, target, by_rows=by_rows)


def has_contiguous_rows(kind: Kind, shape: Shape) -> bool:
    """Whether the canonical matrix of such a weight has its entries in the order in which they are stored."""
    stored = torch.empty(shape, device="meta")
    canonical = kind.to_canonical(stored)
    return canonical.is_contiguous() and (canonical is stored or canonical._base is stored)


def read_exactly(source: FileTensor, into: memoryview, offset: int) -> None:
    """Fill `into` with the tensor's bytes from `offset`.

    Raises:
        FileFormatError: the file is shorter.
    """
    while into:
        read = os.preadv(source.descriptor, [into], source.begin + offset)
        if not read:
            raise became_shorter(source.where)
        into, offset = into[read:], offset + read


def write_exactly(target: FileTensor, data: memoryview, offset: int) -> None:
    """Write all of `data` at the tensor's byte `offset`."""
    while data:
        written = os.pwrite(target.descriptor, data, target.begin + offset)
        data, offset = data[written:], offset + written


def copy_bytes(source: FileTensor, target: FileTensor) -> Iterator[int]:
    """Copy the tensor in chunks, in the kernel if it can; yield the number of bytes of each chunk.

    Raises:
        FileFormatError: the source is shorter.
    """
    done, copy = 0, _kernel_copy
    while done < source.nbytes:
        length = min(COPIED, source.nbytes - done)
        try:
            copied = copy(source.descriptor, target.descriptor, length, source.begin + done, target.begin + done)
        except OSError as error:
            if copy is _plain_copy or error.errno not in NO_KERNEL_COPY:
                raise
            copy = _plain_copy
            continue
        if not copied and copy is _kernel_copy:  # some file systems return 0 when they cannot copy
            copy = _plain_copy
            continue
        if not copied:
            raise became_shorter(source.where)
        done += copied
        yield copied


def _kernel_copy(source: int, target: int, length: int, source_at: int, target_at: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "no copy_file_range")
    return os.copy_file_range(source, target, length, source_at, target_at)


def _plain_copy(source: int, target: int, length: int, source_at: int, target_at: int) -> int:
    data = os.pread(source, min(length, 1 << 23), source_at)
    return os.pwrite(target, data, target_at) if data else 0
