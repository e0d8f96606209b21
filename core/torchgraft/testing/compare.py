"""Comparisons that checks use, with their tolerances and messages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ROUNDINGS = 8
"""Tolerance of 16-bit results, in eps: a weight, a product and a sum are rounded on both sides."""
SUMMANDS = 64
"""Tolerance of more precise results, in eps: both sides add, in different orders, terms that can be much larger than the sum."""


class FailedError(AssertionError):
    """Raised when the method does not pass the check."""


class SkippedError(Exception):
    """Raised when the check does not apply to the method or the layer."""


def require(condition: bool, message: str) -> None:
    """Fail the check with `message` unless the condition holds.

    Raises:
        FailedError: the condition does not hold.
    """
    if not condition:
        raise FailedError(message)


def claimed(condition: bool, what: str) -> None:
    """Skip the check unless the method claims `what`.

    Raises:
        SkippedError: the method does not claim `what`.
    """
    if not condition:
        raise SkippedError(f"not claimed: {what}")


def close(found: Tensor, expected: Tensor, eps: float, what: str, hint: str) -> None:
    """Check that two tensors are equal up to rounding.

    Args:
        eps: the largest machine epsilon of the arithmetic involved.
        what: the compared quantity: "the merged layer's output".
        hint: where to look for the error.

    Raises:
        FailedError: the shapes differ, or a difference exceeds ROUNDINGS or SUMMANDS times eps times the largest expected magnitude.
    """
    require(found.shape == expected.shape, f"{what} has the shape {tuple(found.shape)}, where {tuple(expected.shape)} is expected; {hint}")
    if not found.numel():
        return
    one, other = found.detach().double(), expected.detach().double()
    require(bool(one.isfinite().all()), f"{what} has NaN or infinite entries; {hint}")
    allowed = (ROUNDINGS if eps > 1e-4 else SUMMANDS) * eps * float(other.abs().max())
    differences = (one - other).abs()
    worst = int(differences.argmax())
    require(
        bool(differences.flatten()[worst] <= allowed),
        f"{what}: expected {other.flatten()[worst]:.6g}, found {one.flatten()[worst]:.6g}, the largest difference of "
        f"{differences.flatten()[worst]:.3g} where {allowed:.3g} is allowed; {hint}",
    )


def same_bits(found: Tensor, expected: Tensor, what: str, hint: str) -> None:
    """Check that two tensors have the same dtype, shape and bits.

    Raises:
        FailedError: dtype, shape or any bit differs.
    """
    require(
        found.dtype == expected.dtype and found.shape == expected.shape,
        f"{what} is {_described(found)}, where {_described(expected)} is expected; {hint}",
    )
    if found.numel() and not _bytes(found).equal(_bytes(expected)):
        wrong = ~((found == expected) | (found.isnan() & expected.isnan())) if found.is_floating_point() else found != expected
        largest = (found.double() - expected.double()).abs().nan_to_num(0).max()
        message = f"{what} is not the same to the last bit: {int(wrong.sum())} of {found.numel()} entries differ, by up to {largest:.3g}"
        require(False, f"{message}; {hint}")


def finite(tensor: Tensor | None, what: str, hint: str) -> None:
    """Check that there is a tensor without NaN or infinite entries.

    Raises:
        FailedError: there is no tensor, or an entry is NaN or infinite.
    """
    require(tensor is not None and bool(tensor.isfinite().all()), f"{what} {'is missing' if tensor is None else 'is not finite'}; {hint}")


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters, buffers and further tensors in the state_dict, such as the scales of quantized weights."""
    state = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {name: tensor.detach().clone() for name, tensor in {**state, **dict(module.named_buffers())}.items()}


def unchanged(module: nn.Module, before: Mapping[str, Tensor], when: str, hint: str) -> None:
    """Check that every tensor that `snapshot` copied still has the same bits.

    Raises:
        FailedError: a tensor is missing or has other bits.
    """
    now = snapshot(module)
    for name, tensor in before.items():
        require(name in now, f"{when}: the base's {name} is gone; {hint}")
        same_bits(now[name], tensor, f"{when}: the base's {name}", hint)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
