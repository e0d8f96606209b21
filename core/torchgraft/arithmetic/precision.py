"""Checks and conversions of values: finite results, types, and the tolerance of a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from torchgraft.errors import MergeError


def check_finite(name: str, merged: Tensor, stored: Tensor, params: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that the merge made no finite entry NaN or infinite.

    Raises:
        MergeError: an entry of `merged` is NaN or infinite where `stored` is finite.
    """
    if all_finite(merged) or (merged.isfinite() | ~stored.isfinite()).all():
        return
    if not params:
        raise MergeError(f"{name}: it has values outside the range of {merged.dtype}; choose another dtype. Nothing was changed")
    bad = [key for tensors in params for key, tensor in tensors.items() if not tensor.isfinite().all()]
    why = f"the adapter's {', '.join(bad)} has such entries" if bad else f"the sum leaves the range of {merged.dtype}"
    raise MergeError(f"{name}: the merged weight has NaN or infinite entries ({why}). Nothing was changed")


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. The largest magnitude decides, which is much faster than testing each entry."""
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch does not compute with float8
    return not tensor.numel() or not tensor.is_floating_point() or isfinite(tensor.abs().max())


def replacement(name: str, trained: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return `trained` in `dtype`, to replace a tensor of `shape`.

    Raises:
        MergeError: `trained` has another shape, or an entry is NaN or infinite in that dtype.
    """
    if list(trained.shape) != list(shape):
        raise MergeError(f"{name}: the trained tensor has the shape {list(trained.shape)}, the model's {list(shape)}")
    result = trained.to(dtype)
    if not all_finite(result):
        raise MergeError(f"{name}: the trained tensor has NaN or infinite entries as {dtype}. Nothing was changed")
    return result


def tolerance(written: torch.dtype, result: Tensor, original: Tensor) -> Tensor:
    """Return the absolute error allowed in each merged entry: one ulp of the dtype `written` and the rounding errors of the float64 sum."""
    smallest = torch.finfo(written).smallest_normal
    largest = sum(tensor.nan_to_num(0, 0, 0).abs().amax() for tensor in (result, original))
    return torch.finfo(written).eps * (result.abs() + smallest) + 16 * torch.finfo(torch.float64).eps * largest


def exactly(tensor: Tensor) -> torch.autocast:
    """Return a context manager in which the caller's autocast does not narrow the arithmetic."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)  # torch has no autocast for meta


def widened(params: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return the adapter's floating tensors in `dtype`, the type of the arithmetic."""
    return {name: tensor.detach().to(device, dtype) if tensor.is_floating_point() else tensor for name, tensor in params.items()}
