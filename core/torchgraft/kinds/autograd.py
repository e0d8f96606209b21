"""Products with a custom backward, for which they save less than autograd would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class WideLowRank(torch.autograd.Function):
    """Computes gain·(h + s·(x·Aᵀ)·Bᵀ) + shift for rows in the type of A and B, and rounds once, to the type of `h`.

        h (rows, out), x (rows, in), A (r, in), B (out, r); gain and shift (out,), or None for 1 and 0

    Autograd would save copies of `x` and of the sum in the wide type for backward, in each layer. This function saves `x` and `h`
    in their own type and widens them again. The gradient can be differentiated in turn.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        u = x.to(a.dtype) @ a.t()
        ctx.save_for_backward(h if gain is not None else None, x, u, a, b, gain)
        ctx.scale = scale
        y = h + scale * (u @ b.t()) if gain is None else gain * (h + scale * (u @ b.t()))
        return (y if shift is None else y + shift).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        h, x, u, a, b, gain = ctx.saved_tensors
        grad, wide, grad_gain = grads[0].to(b.dtype), x.to(a.dtype), None
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the saved u has no graph
            u = wide @ a.t()
        grad_shift = grad.sum(0) if ctx.needs_input_grad[6] else None
        if gain is not None:
            grad_gain = torch.linalg.vecdot(grad, h + ctx.scale * (u @ b.t()), dim=0) if ctx.needs_input_grad[5] else None
            grad = grad * gain
        grad_u: Any = ctx.scale * (grad @ b) if needs_x or needs_a else None
        grad_x = (grad_u @ a).to(x.dtype) if needs_x else None
        grad_a = grad_u.t() @ wide if needs_a else None
        grad_b = ctx.scale * (grad.t() @ u) if needs_b else None
        return grad.to(grads[0].dtype), grad_x, grad_a, grad_b, None, grad_gain, grad_shift


def wide_low_rank(h: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    y: Tensor = WideLowRank.apply(h, x, a, b, scale, gain, shift)  # type: ignore[no-untyped-call]
    return y


def is_wider(a: Tensor, h: Tensor) -> bool:
    return a.dtype != h.dtype and torch.promote_types(a.dtype, h.dtype) == a.dtype


def autocast(x: Tensor) -> bool:
    """Whether autocast narrows products on the device of `x`."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


class Product(torch.autograd.Function):
    """Computes x·Wᵀ + bias with a weight that is already dequantized. It is not saved for backward, which dequantizes it again.

    In its own backward, bitsandbytes rounds the weight to the type that it was quantized from.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, bias: Tensor | None, again: Callable[[], Tensor]) -> Tensor:
        ctx.again = again
        return F.linear(x, stored, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        grad_x = grad @ ctx.again() if ctx.needs_input_grad[0] else None
        return grad_x, None, grad.sum(0) if ctx.needs_input_grad[2] else None, None


def product(x: Tensor, stored: Tensor, bias: Tensor | None, again: Callable[[], Tensor]) -> Tensor:
    y: Tensor = Product.apply(x, stored, bias, again)  # type: ignore[no-untyped-call]
    return y
