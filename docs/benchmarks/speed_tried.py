"""Compare the implementation of LoRA's and DoRA's update with the alternatives that are not used."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from speed_rows import timed
from torch import Tensor
from torch.nn import functional as F

RANK, SCALE = 16, 2.0
TOKENS = [256, 1024]
SIZES = [(768, 768), (768, 2048), (1536, 1536)]
"""Pairs of in_features and out_features."""


class Fused(torch.autograd.Function):
    """Compute layer and update in one function, whose backward adds to the gradient of x in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        u = F.linear(x, a)
        ctx.save_for_backward(x, u, w, a, b)
        return F.linear(x, w).addmm_(u, b.t(), alpha=SCALE)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (x, u, w, a, b) = grads, ctx.saved_tensors
        grad_u = torch.mm(g, b).mul_(SCALE)
        return torch.mm(g, w).addmm_(grad_u, a), None, torch.mm(grad_u.t(), x), torch.mm(g.t(), u).mul_(SCALE)


class Contiguous(Fused):
    """Do as Fused, with each factor laid out as its product reads it fastest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        u = torch.mm(x, a.t().contiguous())
        ctx.save_for_backward(x, u, w, a, b)
        return F.linear(x, w).addmm_(u, b.t().contiguous(), alpha=SCALE)


class FusedGain(torch.autograd.Function):
    """Compute layer, update and DoRA's gain in one function, whose backward sums the gain's gradient by row blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, gain: Tensor) -> Tensor:
        u = F.linear(x, a)
        h = F.linear(x, w).addmm_(u, b.t(), alpha=SCALE)
        ctx.save_for_backward(x, u, w, a, b, gain, h)
        return h * gain

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (x, u, w, a, b, gain, h) = grads, ctx.saved_tensors
        grad_gain = sum((left * right).sum(0) for left, right in zip(g.split(128), h.split(128), strict=True))
        g = g * gain
        grad_u = torch.mm(g, b).mul_(SCALE)
        return torch.mm(g, w).addmm_(grad_u, a), None, torch.mm(grad_u.t(), x), torch.mm(g.t(), u).mul_(SCALE), grad_gain


def separate(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute the update as a separate tensor."""
    return F.linear(x, w) + SCALE * F.linear(F.linear(x, a), b)


def in_place(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w).addmm_(F.linear(x, a), b.t(), alpha=SCALE)


def batched(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add in three dimensions, without flattening first."""
    x = x[None]
    return F.linear(x, w).baddbmm_(F.linear(x, a), b.t()[None], alpha=SCALE)[0]


def scaled_before(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Apply the scale to the narrow product."""
    return F.linear(x, w).addmm_(SCALE * F.linear(x, a), b.t())


def multiplied(x: Tensor, w: Tensor, a: Tensor, b: Tensor, gain: Tensor) -> Tensor:
    return in_place(x, w, a, b) * gain


FORMS: dict[str, Callable[..., Tensor]] = {
    "in place": in_place,
    "separate": separate,
    "baddbmm_": batched,
    "scale first": scaled_before,
    "autograd.Function": Fused.apply,  # type: ignore[dict-item]
    "the same, contiguous": Contiguous.apply,  # type: ignore[dict-item]
}
GAIN_FORMS: dict[str, Callable[..., Tensor]] = {
    "gain multiplied": multiplied,
    "gain in the autograd.Function": FusedGain.apply,  # type: ignore[dict-item]
}


def measure(repetitions: int) -> dict[str, Any]:
    return {"forms": [forms(*size, tokens, 10 * repetitions) for tokens in TOKENS for size in SIZES]}


def forms(width: int, out: int, tokens: int, repetitions: int) -> dict[str, Any]:
    """Time a training step of one layer, alone and with each form of LoRA."""
    x = torch.randn(tokens, width, requires_grad=True)
    w, g, u = torch.randn(out, width), torch.randn(tokens, out), torch.randn(tokens, RANK)
    a, b, gain = (torch.randn(shape, requires_grad=True) for shape in ((RANK, width), (out, RANK), (out,)))
    h, grad_x = torch.randn(tokens, out), torch.randn(tokens, width)

    def step(form: Callable[..., Tensor], *factors: Tensor) -> None:
        torch.autograd.backward(form(x, w, *factors), g)
        x.grad = a.grad = b.grad = gain.grad = None

    @torch.no_grad()
    def products() -> None:
        """Run LoRA's six matrix products, without the layer's two."""
        torch.mm(x, a.t())
        h.addmm_(u, b.t())
        torch.mm(g, b)
        torch.mm(g.t(), u)
        torch.mm(u.t(), x)
        grad_x.addmm_(u, a)

    calls: dict[str, Callable[[], Any]] = {"frozen": lambda: step(F.linear), "products": products}
    calls |= {name: lambda form=form: step(form, a, b) for name, form in FORMS.items()}
    calls |= {name: lambda form=form: step(form, a, b, gain) for name, form in GAIN_FORMS.items()}
    return {"in": width, "out": out, "tokens": tokens, "times": in_turn(calls, repetitions)}


def in_turn(calls: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 10):
        for name in random.sample(list(calls), len(calls)):
            seconds = timed(calls[name])
            if repetition > 9:
                found[name].append(seconds)
    return found
