"""Corrections restore the bits of any tensor, and of no other one."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import torchgraft as tg
from one_layer import DTYPES
from references import bits
from torchgraft.arithmetic.exact import correct, make_correction, restore
from torchgraft.hashes import sha256_of_tensor

ALL_DTYPES = [*DTYPES.values(), torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]


PairOfBits = tuple[bytes, bytes, torch.dtype, bool]


def from_bytes(data: bytes, dtype: torch.dtype, transpose: bool) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    matrix = flat.reshape(2, -1)
    return matrix.T if transpose else matrix


@st.composite
def pairs_of_bits(draw: st.DrawFn) -> PairOfBits:
    """Two tensors of arbitrary bits, the second often mostly the first."""
    dtype = draw(st.sampled_from(ALL_DTYPES))
    size = 2 * draw(st.integers(0, 20)) * dtype.itemsize
    words = st.integers(0, 1) if dtype == torch.bool else st.integers(0, 255)
    original = draw(st.lists(words, min_size=size, max_size=size))
    changes = draw(st.dictionaries(st.integers(0, size - 1), words)) if size else {}
    return bytes(original), bytes(changes.get(place, byte) for place, byte in enumerate(original)), dtype, draw(st.booleans())


@settings(deadline=None)
@given(pairs_of_bits(), st.integers(0))
def test_a_correction_restores_any_bits_and_holds_no_more_than_the_differences(pair: PairOfBits, bit: int) -> None:
    first, second, dtype, transpose = pair
    original, nearly = (from_bytes(data, dtype, transpose) for data in (first, second))
    correction, expected = make_correction(original, nearly), sha256_of_tensor(original)
    restored = restore(nearly, correction, expected, "layer")
    assert (restored.shape, restored.dtype) == (original.shape, dtype)
    assert torch.equal(bits(restored), bits(original))
    assert torch.equal(bits(nearly), bits(from_bytes(second, dtype, transpose))), "what was given must stay as it was"
    entries = range(0, len(first), dtype.itemsize)
    different = sum(first[at : at + dtype.itemsize] != second[at : at + dtype.itemsize] for at in entries)
    dense = len(correction.step) == 0 < different
    assert len(correction.step) == (0 if dense else different)
    assert correction.nbytes <= len(first), "never more than the tensor itself"
    assert dense or correction.nbytes <= different * (2 + dtype.itemsize) + original.numel() // 255, "no more than the differences"
    row_major = bits(original).numpy().tobytes()
    assert expected == hashlib.sha256(row_major).hexdigest()

    with pytest.raises(tg.MergeError, match=r"layer: unmerging does not restore the original bits.*Nothing was changed"):
        restore(nearly, correction, hashlib.sha256(row_major + b"0").hexdigest(), "layer")
    if original.numel() and dtype != torch.bool:
        flipped = bits(nearly)
        flipped.view(-1)[bit % original.numel()] ^= 1
        with pytest.raises(tg.MergeError, match="layer: unmerging does not restore the original bits"):
            restore(flipped.view(dtype), correction, expected, "layer")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1200), st.integers(-(2**15), 2**15 - 1)), max_size=12), st.integers(0, 1500))
def test_a_correction_spans_long_ways_and_large_steps(places: list[tuple[int, int]], rest: int) -> None:
    size = sum(way + 1 for way, _ in places) + rest
    nearly, at = torch.zeros(size, dtype=torch.int16), -1
    original = nearly.clone()
    for way, step in places:
        at += way + 1
        original[at] = step
    correction = make_correction(original.view(torch.bfloat16), nearly.view(torch.bfloat16))
    assert correct(nearly.view(torch.bfloat16), correction).view(torch.int16).equal(original)


def test_a_correction_of_another_tensor_is_refused() -> None:
    original, nearly = torch.arange(300.0), torch.arange(300.0)
    original[[5, 299]] += 1
    correction = make_correction(original, nearly)
    for broken in (
        replace(correction, gap=correction.gap[:1]),
        replace(correction, step=correction.step[:1]),
        replace(correction, wide=correction.wide[1:]),
        make_correction(torch.cat([original, original]), torch.cat([nearly, nearly])),
    ):
        with pytest.raises(ValueError, match="does not fit this tensor"):
            correct(nearly, broken)
