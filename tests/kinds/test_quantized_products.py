"""Test that a 4-bit weight is dequantized once for the norm of DoRA and the layer's product."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import torchgraft as tg
from quantized_layers import (
    DTYPES,
    RANK,
    adapted,
    assert_same,
    decoded,
    dense,
    effective,
    eight_bit,
    error,
    four_bit,
    inputs,
    layer_alone,
)


@pytest.mark.parametrize("how", [{}, {"bias": False}, {"quant_type": "fp4", "compress_statistics": False}], ids=["nf4", "no bias", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dequantized_weight_already_loaded_gives_what_the_layer_gives(dtype: str, how: dict[str, Any]) -> None:
    """To the last bit: output, and the gradients of input and bias."""
    layer = four_bit(dtype=dtype, compute=dtype, **how).train()
    kind: Any = tg.apply(nn.Sequential(layer), "lora", ["0"], rank=RANK).sites[0].kind
    base = bnb.nn.Linear4bit.forward.__get__(layer)
    results = []
    for product in (base, lambda x: kind.product_with(layer, x, kind.weight_for_product(layer, x, base))):
        x = inputs(layer, DTYPES[dtype]).flatten(0, -2).requires_grad_()
        wanted = [x] if layer.bias is None else [x, layer.bias.requires_grad_()]
        y = product(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    assert_same(*results)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("compute", [*DTYPES, None])
@pytest.mark.parametrize("stored", DTYPES)
def test_dora_in_training_in_types_that_differ(stored: str, compute: str | None, own: str, autocast: bool) -> None:
    layer = four_bit(dtype=stored, compute=compute).train()
    weight = decoded(layer)
    model, adapter = adapted(layer, "dora")
    x = inputs(layer, DTYPES[own]).requires_grad_()
    kind: Any = adapter.sites[0].kind
    taken: list[int] = []
    product = type(kind).product_with
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        patch.setattr(type(kind), "product_with", lambda *given, **named: taken.append(1) or product(*given, **named))
        y = model(x)
    assert y.dtype == layer_alone(layer, x, autocast).dtype
    assert bool(taken) == (compute == own and not autocast and DTYPES[own] == torch.promote_types(DTYPES[stored], DTYPES[own]))
    y.double().square().sum().backward()
    wide = x.detach().double().requires_grad_()
    want = dense(layer, effective(adapter, weight), wide)
    want.square().sum().backward()
    narrow = {stored, compute, own} != {"float32"} or autocast
    assert error(y, want) < (0.02 if narrow else 1e-5)
    assert error(x.grad, wide.grad) < (0.02 if narrow else 1e-5)


def test_a_weight_is_dequantized_for_the_product_only_where_that_is_taken() -> None:
    layer = four_bit().train()
    model, adapter = adapted(layer, "dora")
    site, x = adapter.sites[0], inputs(layer)
    forward = bnb.nn.Linear4bit.forward.__get__(layer)
    assert torch.equal(site.weight_for_product(x, forward), site.stored_weight())
    assert site.weight_for_product(x.half(), forward) is None
    assert site.weight_for_product(x.transpose(0, 1), forward) is None
    assert site.weight_for_product(x, lambda x: forward(x)) is None, "another adapter is below"
    with torch.autocast("cpu", torch.bfloat16):
        assert site.weight_for_product(x, forward) is None
    assert adapted(eight_bit().train())[1].sites[0].weight_for_product(x, forward) is None
    model.eval()
    assert site.weight_for_product(x, forward) is None, "the norm is kept"


def test_dora_dequantizes_once_for_norm_and_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = four_bit().train()
    model, adapter = adapted(layer, "dora")
    x, weight = inputs(layer).requires_grad_(), decoded(layer)
    model(x)  # ‖W₀‖² is kept from here on
    calls = []
    original = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *given, **named: calls.append(1) or original(*given, **named))
    monkeypatch.setattr(torch.ops.bitsandbytes, "gemm_4bit", None)  # it dequantizes out of sight
    y = model(x)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2, "the weight is not to be kept for backward"
    assert error(y, dense(layer, effective(adapter, weight), x)) < 1e-5
