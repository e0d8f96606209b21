"""How checks judge, and how they say what is wrong."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ROUNDINGS = 8
"""Of results in 16 bits: a weight, a product and a sum are rounded, on both sides."""
SUMMANDS = 64
"""Of finer results: they are sums, in another order on each side, of terms that can be much larger than the sum."""


class FailedError(AssertionError):
    """The method does not do what the check asks for."""


class SkippedError(Exception):
    """There is nothing to check here."""


def require(condition: bool, message: str) -> None:
    """
    Raises:
        FailedError: the condition does not hold.
    """
    if not condition:
        raise FailedError(message)


def claimed(condition: bool, what: str) -> None:
    """
    Raises:
        SkippedError: the method does not claim `what`.
    """
    if not condition:
        raise SkippedError(f"not claimed: {what}")


def close(found: Tensor, expected: Tensor, eps: float, what: str, hint: str) -> None:
    """
    Args:
        eps: of the coarsest arithmetic on the way.
        what: was compared: "the merged layer's output".
        hint: where to look.

    Raises:
        FailedError: the shapes differ, or the values differ by more than so many eps of the largest expected magnitude.
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
    """
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
    """
    Raises:
        FailedError: there is no tensor, or an entry is NaN or infinite.
    """
    require(tensor is not None and bool(tensor.isfinite().all()), f"{what} {'is missing' if tensor is None else 'is not finite'}; {hint}")


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, and of what belongs to them in the state_dict: scales of quantised weights."""
    state = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {name: tensor.detach().clone() for name, tensor in {**state, **dict(module.named_buffers())}.items()}


def unchanged(module: nn.Module, before: Mapping[str, Tensor], when: str, hint: str) -> None:
    """
    Raises:
        FailedError: of what `snapshot` took, something is gone or has other bits.
    """
    now = snapshot(module)
    for name, tensor in before.items():
        require(name in now, f"{when}: the base's {name} is gone; {hint}")
        same_bits(now[name], tensor, f"{when}: the base's {name}", hint)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
