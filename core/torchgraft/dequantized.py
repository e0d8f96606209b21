"""A quantised layer with its weight dequantised: while an adapter is merged into it, or for one product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dequantized(nn.Linear):
    """A linear layer that takes inputs of any floating type and answers in that type, as the quantised layers do."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]  # as in nn.Linear itself

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


class Product(torch.autograd.Function):
    """x·Wᵀ + bias with the weight at hand. It is not kept for backward, but made again there: the same weight.

    bitsandbytes rounds it in backward to the type that it was quantised from.
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
