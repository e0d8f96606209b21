"""Test 4-bit layers that bitsandbytes repacks in an eval forward on CPUs with AVX512-BF16."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import torchgraft as tg
from models import perturb_
from quantized_layers import ALPHA, METHODS, RANK, adapted, assert_same, decoded, dense, effective, error, four_bit, inputs, repacks, stored


@repacks
@pytest.mark.parametrize("moment", ["before the adapter", "with the adapter"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_after_bitsandbytes_has_repacked_the_weight(method: str, quant_type: str, double: bool, moment: str) -> None:
    """In eval the layer computes in bfloat16, with scales that are rounded to it for good."""
    layer = four_bit(quant_type=quant_type, compress_statistics=double).eval()
    weight, codes, x = decoded(layer), layer.weight.data.clone(), inputs(layer)
    if moment == "before the adapter":
        layer(x)
    model, adapter = adapted(layer, method)
    model(x)
    got = model(x)
    if moment == "before the adapter":
        assert layer.weight.quant_state.packing_format_for_cpu
        assert not layer.weight.data.reshape(-1).equal(codes.reshape(-1)), "the codes must have moved"
    assert error(got, dense(layer, effective(adapter, weight), x)) < 0.01

    seen = adapter.sites[0].weight()
    with adapter.disabled():
        computed = model(torch.eye(layer.in_features)).T - layer.bias[:, None]
    torch.testing.assert_close(computed, seen, rtol=2**-7, atol=2**-7)  # a product with 1, and a sum with the bias, in bfloat16
    torch.testing.assert_close(seen.double(), weight, rtol=2**-8, atol=1e-7)  # each scale is off by half of bfloat16's step
    before = stored(layer)
    adapter.merge()
    assert error(layer.weight, effective(adapter, seen)) < 1e-6
    assert error(model(x), got) < 0.01
    adapter.unmerge()
    assert model(x).equal(got)
    adapter.detach()
    assert_same(stored(layer)[1:], before[1:])
    assert type(layer) is bnb.nn.Linear4bit


@repacks
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@torch.no_grad()
def test_loading_an_adapter_leaves_a_repacked_weight_alone(double: bool, tmp_path: Path) -> None:
    """bitsandbytes' own way back, which its state_dict takes, leaves single scales transposed."""
    model, adapter = adapted(four_bit(compress_statistics=double))
    adapter.save(tmp_path)
    adapter.detach()
    x = inputs(model.eval()[0])
    want = model(x)
    assert model[0].weight.quant_state.packing_format_for_cpu
    before = stored(model[0])
    loaded = tg.load(model, tmp_path)
    assert_same(stored(model[0])[1:], before[1:])
    unmerged = model(x)
    loaded.merge()
    assert error(model(x), unmerged) < 0.01
    loaded.detach()
    assert_same(stored(model[0]), before)
    assert model(x).equal(want)


@repacks
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_eval_forward_that_repacks_computes_what_the_next_ones_do(method: str) -> None:
    model, _ = adapted(four_bit().eval(), method)
    first = model(inputs(model[0]))
    assert model(inputs(model[0])).equal(first)


@repacks
@pytest.mark.parametrize("targets", [["0"], ["0", "1"]], ids=["an adapter before it", "and on it"])
def test_training_goes_on_rightly_after_an_eval_forward(targets: list[str]) -> None:
    model, x = nn.Sequential(nn.Linear(32, 128), four_bit(bias=False)), torch.randn(3, 32)
    weight = decoded(model[1])
    adapter = tg.apply(model, "lora", targets, rank=RANK, alpha=ALPHA)
    perturb_(adapter.parts["0"].parameters())
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).sum().backward()
    a, b = (adapter.parts["0"].tensors()[name].detach().double().requires_grad_() for name in "AB")
    (dense(model[0], model[0].weight.detach() + ALPHA / RANK * b @ a, x) @ weight.T).sum().backward()
    assert error(adapter.parts["0"].A.grad, a.grad) < 0.02
    assert error(adapter.parts["0"].B.grad, b.grad) < 0.02


@pytest.mark.parametrize("out", [64, 6])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@torch.no_grad()
def test_layers_that_we_quantize_are_never_repacked(double: bool, out: int) -> None:
    model = nn.Sequential(nn.Linear(128, out)).eval()
    adapter = tg.apply(model, "qlora", ["0"], rank=2, double_quant=double, compute_dtype="float32")
    before, weight, x = stored(model[0]), decoded(model[0]), inputs(model[0])
    for module in (model, deepcopy(model)):
        assert error(module(x), dense(module[0], weight, x)) < 1e-6
        assert_same(stored(module[0]), before)
    adapter.detach()
    assert error(model(x), dense(model[0], weight, x)) < 1e-6
    assert_same(stored(model[0])[1:], before[1:])
