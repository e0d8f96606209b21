"""Fingerprint the targeted weights by a sample, to check that a base is the one that an adapter was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from torchgraft import dtypes
from torchgraft.hashes import as_bytes, sha256_of_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from torchgraft.checkpoint.reading import Checkpoint

RUNS = 16
LENGTH = 16
SOURCE = "_torchgraft_source"
"""Attribute of a layer that torchgraft quantized: the fingerprint of the weight before."""
COMPARABLE = frozenset({"float32", "float64", "bfloat16"})
"""Rounded to bfloat16, these dtypes give the same sample of the same weight; float16 loses other bits."""


def runs(numel: int) -> list[tuple[int, int]]:
    """Return the sampled ranges: (first, last + 1) of up to 16 runs of 16 entries, evenly spread over the flat weight."""
    if numel <= RUNS * LENGTH:
        return [(0, numel)]
    return [(start := run * (numel - LENGTH) // (RUNS - 1), start + LENGTH) for run in range(RUNS)]


def of_tensor(stored: Tensor) -> str:
    """Return the fingerprint of a weight in memory; empty on the meta device."""
    import torch

    if stored.is_meta:
        return ""
    flat = stored.detach().reshape(-1)
    sample = torch.cat([flat[first:end] for first, end in runs(flat.numel())])
    return _digest(bytes(as_bytes(sample)), dtypes.name_of(stored.dtype))


def of_file(checkpoint: Checkpoint, name: str) -> str:
    """Return the fingerprint of a weight in a file. Only the sample is read, without torch."""
    entry = checkpoint.tensors[name]
    size = dtypes.SIZES[entry.dtype]
    with checkpoint.file_of[name].open("rb", buffering=0) as file:
        pieces = []
        for first, end in runs(entry.numel):
            file.seek(entry.begin + first * size)
            pieces.append(file.read((end - first) * size))
    return _digest(b"".join(pieces), entry.dtype) if entry.numel else ""


def comparable(one: str, other: str) -> bool:
    """Whether the same weight has the same fingerprint in both dtypes."""
    return one == other or {one, other} <= COMPARABLE


def _digest(sample: bytes, dtype: str) -> str:
    hashed = sample if dtype == "bfloat16" or dtype not in COMPARABLE else _to_bfloat16(sample, dtype).tobytes()
    return sha256_of_bytes(hashed)[:32]


def _to_bfloat16(sample: bytes, dtype: str) -> np.ndarray[Any, Any]:
    """Round to nearest, ties to even; return the upper halves of the float32 values."""
    with np.errstate(over="ignore", invalid="ignore"):  # invalid: a signaling NaN
        narrow = np.frombuffer(sample, dtype).astype(np.float32)
    bits = narrow.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(narrow), 0x7FC0, rounded).astype(np.uint16)
