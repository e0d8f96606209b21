"""Undo a merge bit for bit.

Subtracting the change does not restore the old bits, because rounding lost some. So a merge also computes what subtraction
would restore, and records a sparse correction of the entries that differ, and a hash of the whole to verify the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchgraft.errors import MergeError
from torchgraft.hashes import row_major, sha256_of_tensor

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type of each element size. Bits are compared, not values, because NaN and -0.0 must be restored too."""

Numbers = np.ndarray[Any, Any]

SKIP = 255
"""Gap code: skip 255 entries without a correction; the next gap continues from there."""
LARGE = -128
"""Escape code: the difference does not fit in int8 and is the next value of `wide`."""


@dataclass(frozen=True)
class Correction:
    """The differences between the bits of a nearly restored tensor and the original, read as integers, and their places.

    Most differences are one or two units in the last place, and rare: two bytes each. If there are so many that storing `wide`
    for every entry costs less, `gap` and `step` are empty.
    """

    gap: Numbers
    """Number of entries between one corrected entry and the next, uint8; SKIP for longer distances."""
    step: Numbers
    """Differences of the corrected entries, int8; LARGE if they do not fit."""
    wide: Numbers
    """Differences whose step is LARGE, as integers of the tensor's element size."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.gap, self.step, self.wide))


def make_correction(original: Tensor, nearly: Tensor) -> Correction:
    """Return the correction that turns `nearly` into `original`. Both have the same shape and dtype."""
    bits, near = _integers(original), _integers(nearly)
    at = np.flatnonzero(bits != near)
    difference = bits[at] - near[at]
    fits = (difference > LARGE) & (difference < -LARGE)
    gaps = _gaps(at)
    if gaps.nbytes + at.size + (at.size - np.count_nonzero(fits)) * bits.itemsize > bits.nbytes:
        return Correction(gaps[:0], np.empty(0, np.int8), bits - near)
    return Correction(gaps, np.where(fits, difference, LARGE).astype(np.int8), difference[~fits])


def correct(nearly: Tensor, correction: Correction) -> Tensor:
    """Return the original as a new tensor on the CPU, from the nearly restored one.

    Raises:
        ValueError: the correction does not fit a tensor of this size.
    """
    bits = _integers(nearly).copy()
    gap, step, wide = correction.gap, correction.step, correction.wide
    if wide.size == bits.size and not gap.size:
        bits += wide
    else:
        at = np.cumsum(np.where(gap == SKIP, SKIP, gap.astype(np.int64) + 1))[gap != SKIP] - 1
        difference = step.astype(bits.dtype)
        if at.size != step.size or np.count_nonzero(step == LARGE) != wide.size or (at.size and at[-1] >= bits.size):
            raise ValueError("the correction does not fit this tensor")
        difference[step == LARGE] = wide
        bits[at] += difference
    return torch.from_numpy(bits).view(nearly.dtype).reshape(nearly.shape)


def changed_entries(original: Tensor, merged: Tensor) -> int:
    """Return how many entries of `merged` differ from `original` in the dtype of `merged`.

    If most bits differ, they are counted, which is ten times as fast as comparing values; else -0.0 and 0.0, and NaN and NaN, are equal.
    """
    before = original.to(merged.dtype)
    count = int(np.count_nonzero(_integers(before) != _integers(merged)))
    if 0 < count <= merged.numel() // 2:
        one, other = before.double(), merged.double()  # torch does not compare float8
        count = int(((one != other) & ~(one.isnan() & other.isnan())).count_nonzero())
    return count


def restore(nearly: Tensor, correction: Correction, digest_: str, where: str) -> Tensor:
    """Correct `nearly`, and verify that the SHA-256 of the result is `digest_`.

    Raises:
        MergeError: the SHA-256 is another one.
    """
    restored = correct(nearly, correction)
    if sha256_of_tensor(restored) != digest_:
        raise not_restored(where)
    return restored


def not_restored(where: str) -> MergeError:
    return MergeError(
        f"{where}: unmerging does not restore the original bits: the merged weight was changed since, or the arithmetic "
        "here differs from where it was merged. Nothing was changed; take the weights from the base model"
    )


def _gaps(at: Numbers) -> Numbers:
    between = at.copy()
    between[1:] -= at[:-1] + 1
    if not between.size or between.max() < SKIP:
        return between.astype(np.uint8)
    skips = between // SKIP
    gaps = np.full(at.size + skips.sum(), SKIP, np.uint8)
    gaps[np.cumsum(skips + 1) - 1] = between % SKIP
    return gaps


def _integers(tensor: Tensor) -> Numbers:
    """Return the bits of the flattened tensor. A contiguous tensor on the CPU is not copied."""
    found: Numbers = row_major(tensor).view(BITS[tensor.element_size()]).numpy().reshape(-1)
    return found
