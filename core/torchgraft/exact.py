"""Undoing a merge to the last bit.

Subtracting what was added does not give the old bits back: rounding lost some. So a merge also computes what arithmetic
would restore, and records where that misses: a sparse set of entries, and a hash of the whole that proves the result.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchgraft.errors import MergeError

if TYPE_CHECKING:
    from torchgraft.graft import Form

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type of each element size: bits are compared, not values, for NaN and -0.0 are bits too."""

POSITION = 4
"""Bytes of a position in all but giant tensors."""


@dataclass(frozen=True)
class Correction:
    """How to turn the nearly restored tensor into the original.

    Sparse: flat positions, and the original's entries there. Dense, where arithmetic misses so often that positions would
    cost more: no positions, and for every entry the difference of the bits, read as integers.
    """

    index: Tensor
    value: Tensor
    digest: str
    """Of the original."""
    needed: Mapping[str, Tensor] = field(default_factory=dict)
    """What the method asked for, by its hook adapter_undo."""

    @property
    def dense(self) -> bool:
        return self.value.numel() > self.index.numel()


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
    form: Form | None = None
    """Of a quantised layer: what it was before it became a dense one."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """What a module that is trained whole had before."""
    fingerprint: str = ""
    """Of the weight before the merge."""


def make_correction(original: Tensor, nearly: Tensor, needed: Mapping[str, Tensor] | None = None) -> Correction:
    """Where `nearly`, restored with the help of `needed`, differs from `original`; same shape and dtype."""
    bits = BITS[original.element_size()]
    flat, near = original.contiguous().view(bits).flatten(), nearly.contiguous().view(bits).flatten()
    index = torch.nonzero(flat != near).flatten()
    if index.numel() * (POSITION + original.element_size()) > flat.numel() * original.element_size():
        return Correction(index[:0], _narrowed(flat - near), digest(original), needed or {})
    narrow = index.to(torch.int32) if flat.numel() < 2**31 else index
    return Correction(narrow, original.flatten()[index].clone(), digest(original), needed or {})


def correct(nearly: Tensor, correction: Correction, where: str) -> Tensor:
    """The original, from the nearly restored tensor.

    Raises:
        MergeError: the hash of the result is not the original's.
    """
    if correction.dense:
        bits = BITS[nearly.element_size()]
        restored = (nearly.contiguous().view(bits).flatten() + correction.value.to(nearly.device, bits)).view(nearly.dtype)
    else:
        restored = nearly.flatten().clone()
        restored[correction.index.to(nearly.device, torch.int64)] = correction.value.to(nearly.device)
    restored = restored.reshape(nearly.shape)
    if digest(restored) != correction.digest:
        raise MergeError(
            f"{where}: unmerging does not give the original bits: the merged weight was changed since, or the arithmetic "
            "here differs from where it was merged. Nothing was changed; take the weights from the base model"
        )
    return restored


def _narrowed(difference: Tensor) -> Tensor:
    """In a byte each, if they fit: most are a step or two of the last place."""
    narrow = difference.to(torch.int8)
    return narrow if narrow.to(difference.dtype).equal(difference) else difference


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
