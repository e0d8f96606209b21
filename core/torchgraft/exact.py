"""Undoing a merge to the last bit.

Subtracting what was added does not give the old bits back: rounding lost some. So a merge also computes what arithmetic
would restore, and records where that misses: a sparse set of entries, and a hash of the whole that proves the result.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchgraft.errors import MergeError

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type of each element size: bits are compared, not values, for NaN and -0.0 are bits too."""


@dataclass(frozen=True)
class Correction:
    """How to turn the nearly restored tensor into the original: flat positions, the original's entries there, its hash."""

    index: Tensor
    value: Tensor
    digest: str


@dataclass(frozen=True)
class Undo:
    """What is kept while a part is merged."""

    depth: int
    """How many adapters were merged into the module before."""
    snapshot: dict[str, Tensor]
    """The adapter's own tensors as they were merged."""
    merged: dict[str, str]
    """The digests of the module's tensors after the merge."""
    corrections: dict[str, Correction] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    """What a module that is trained whole had before."""
    fingerprint: str = ""
    """Of the weight before the merge."""


def make_correction(original: Tensor, nearly: Tensor) -> Correction:
    """Where `nearly` differs from `original`; same shape and dtype."""
    bits = BITS[original.element_size()]
    flat = original.contiguous().view(bits).flatten()
    index = torch.nonzero(flat != nearly.contiguous().view(bits).flatten()).flatten()
    narrow = index.to(torch.int32) if flat.numel() < 2**31 else index
    return Correction(narrow, original.flatten()[index].clone(), digest(original))


def correct(nearly: Tensor, correction: Correction, where: str) -> Tensor:
    """The original, from the nearly restored tensor.

    Raises:
        MergeError: the hash of the result is not the original's.
    """
    restored = nearly.flatten().clone()
    restored[correction.index.long()] = correction.value
    restored = restored.reshape(nearly.shape)
    if digest(restored) != correction.digest:
        raise MergeError(
            f"{where}: unmerging does not give the original bits: the merged weight was changed since, or the arithmetic "
            "here differs from where it was merged. Nothing was changed; take the weights from the base model"
        )
    return restored


def digest(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes in row-major order."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; without a copy if it lies so on the CPU."""
    flat = tensor.detach().cpu().contiguous()
    size = flat.numel() * flat.element_size()
    if not size:
        return memoryview(b"")
    buffer = (ctypes.c_char * size).from_address(flat.data_ptr())
    buffer._owner = flat  # type: ignore[attr-defined]  # the memory lives as long as the view
    return memoryview(buffer).cast("B")
