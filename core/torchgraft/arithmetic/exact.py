"""Undoing a merge to the last bit.

Subtracting what was added does not give the old bits back: rounding lost some. So a merge also computes what arithmetic
would restore, and records where that misses: a sparse set of entries, and a hash of the whole that proves the result.
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
"""Integer type of each element size: bits are compared, not values, for NaN and -0.0 are bits too."""

Numbers = np.ndarray[Any, Any]

SKIP = 255
"""A gap that passes over 255 entries and corrects none."""
LARGE = -128
"""A step that does not fit into a byte: the next of `wide` has it."""


@dataclass(frozen=True)
class Correction:
    """How to turn a nearly restored tensor into the original: what to add to its bits, read as integers, and where.

    Most misses are a step or two of the last place, and rare: two bytes each. Where there are so many that `wide` for every
    entry costs less, `gap` and `step` are empty.
    """

    gap: Numbers
    """uint8: how many entries lie between one corrected entry and the next; SKIP for longer ways."""
    step: Numbers
    """int8, one for each corrected entry."""
    wide: Numbers
    """The steps that are LARGE, as integers of the tensor's element size."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.gap, self.step, self.wide))


def make_correction(original: Tensor, nearly: Tensor) -> Correction:
    """Where `nearly` differs from `original`; same shape and dtype."""
    bits, near = _integers(original), _integers(nearly)
    at = np.flatnonzero(bits != near)
    difference = bits[at] - near[at]
    fits = (difference > LARGE) & (difference < -LARGE)
    gaps = _gaps(at)
    if gaps.nbytes + at.size + (at.size - np.count_nonzero(fits)) * bits.itemsize > bits.nbytes:
        return Correction(gaps[:0], np.empty(0, np.int8), bits - near)
    return Correction(gaps, np.where(fits, difference, LARGE).astype(np.int8), difference[~fits])


def correct(nearly: Tensor, correction: Correction) -> Tensor:
    """The original, from the nearly restored tensor: a new one, on the CPU.

    Raises:
        ValueError: the correction is not one of a tensor of this size.
    """
    bits = _integers(nearly).copy()
    gap, step, wide = correction.gap, correction.step, correction.wide
    if wide.size == bits.size and not gap.size:
        bits += wide
    else:
        at = np.cumsum(np.where(gap == SKIP, SKIP, gap.astype(np.int64) + 1))[gap != SKIP] - 1
        difference = step.astype(bits.dtype)
        if at.size != step.size or np.count_nonzero(step == LARGE) != wide.size or (at.size and at[-1] >= bits.size):
            raise ValueError("the correction is not one of this tensor")
        difference[step == LARGE] = wide
        bits[at] += difference
    return torch.from_numpy(bits).view(nearly.dtype).reshape(nearly.shape)


def restore(nearly: Tensor, correction: Correction, digest_: str, where: str) -> Tensor:
    """As `correct`, and the result has the hash `digest_`.

    Raises:
        MergeError: it has not.
    """
    restored = correct(nearly, correction)
    if sha256_of_tensor(restored) != digest_:
        raise not_restored(where)
    return restored


def not_restored(where: str) -> MergeError:
    return MergeError(
        f"{where}: unmerging does not give the original bits: the merged weight was changed since, or the arithmetic "
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
    """The flat tensor's bits; no copy if it lies so on the CPU."""
    found: Numbers = row_major(tensor).view(BITS[tensor.element_size()]).numpy().reshape(-1)
    return found
