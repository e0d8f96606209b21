"""What was tried for speed and is not in the code, beside what is: each in one run, in turn."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from speed_rows import timed
from torch import Tensor, nn
from torch.nn import functional as F

import torchgraft as tg

TOKENS, RANK, SCALE = 256, 16, 2.0
SIZES = [(768, 768), (768, 2048), (1536, 1536)]
"""In and out."""


class Fused(torch.autograd.Function):
    """Layer and update as one function, whose backward adds to the gradient of x in place."""

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


def separate(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The update as a tensor of its own."""
    return F.linear(x, w) + SCALE * F.linear(F.linear(x, a), b)


def in_place(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w).addmm_(F.linear(x, a), b.t(), alpha=SCALE)


def batched(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """In three dimensions, without flattening first."""
    x = x[None]
    return F.linear(x, w).baddbmm_(F.linear(x, a), b.t()[None], alpha=SCALE)[0]


FORMS: dict[str, Callable[..., Tensor]] = {
    "in place": in_place,
    "separate": separate,
    "baddbmm_": batched,
    "autograd.Function": Fused.apply,  # type: ignore[dict-item]
}


def measure(repetitions: int) -> dict[str, Any]:
    return {
        "forms": [forms(*size, 10 * repetitions) for size in SIZES],
        "dequantising": [dequantising(*size, 10 * repetitions) for size in SIZES],
    }


def forms(width: int, out: int, repetitions: int) -> dict[str, Any]:
    """A step of one layer with LoRA on it, over that of the layer alone."""
    x = torch.randn(TOKENS, width, requires_grad=True)
    w, g = torch.randn(out, width), torch.randn(TOKENS, out)
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((RANK, width), (out, RANK)))

    def step(form: Callable[..., Tensor], *factors: Tensor) -> None:
        torch.autograd.backward(form(x, w, *factors), g)
        x.grad = a.grad = b.grad = None

    calls = {"frozen": lambda: step(F.linear)} | {name: lambda form=form: step(form, a, b) for name, form in FORMS.items()}
    return {"in": width, "out": out, "times": in_turn(calls, repetitions)}


def dequantising(width: int, out: int, repetitions: int) -> dict[str, Any]:
    """An NF4 weight dequantised to what the layer multiplies with, beside narrowing the copy that DoRA's norm has made."""
    from bitsandbytes import functional as bnb

    layer: Any = tg.quantized_linear(nn.Linear(width, out, bias=False), tg.Quantization())
    narrow = copy(layer.weight.quant_state)
    narrow.dtype = torch.bfloat16
    wide = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(TOKENS, width, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()
        x.grad = None

    calls = {
        "step of the frozen layer": step,
        "dequantise to bfloat16": lambda: bnb.dequantize_4bit(layer.weight.data, narrow),
        "narrow float32 to bfloat16": lambda: wide.bfloat16(),
    }
    return {"in": width, "out": out, "times": in_turn(calls, repetitions)}


def in_turn(calls: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 10):
        for name in random.sample(list(calls), len(calls)):
            seconds = timed(calls[name])
            if repetition > 9:
                found[name].append(seconds)
    return found
