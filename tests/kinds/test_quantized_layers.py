"""Compare every method on the quantized layers of bitsandbytes with the decoded weights, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from quantized_layers import (
    ALPHA,
    DTYPES,
    LAYERS,
    METHODS,
    ODD,
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
    stored,
)


@pytest.mark.parametrize("shape", [(64, 256), (6, 10), (3, 5)], ids=str)
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_method_sees_the_weight_that_the_layer_computes_with(
    dtype: str, quant_type: str, double: bool, blocksize: int, shape: tuple[int, int]
) -> None:
    layer = four_bit(shape, dtype, quant_type=quant_type, compress_statistics=double, blocksize=blocksize)
    _, adapter = adapted(layer, perturb=False)
    (site,) = adapter.sites
    how = {"type": quant_type, "block_size": blocksize, "double": double}
    assert site.quantization.items() >= how.items()
    assert (site.kind.name, site.shape, site.dtype, site.weight().dtype) == ("Linear4bit", shape, dtype, torch.float32)
    computed = layer.train()(torch.eye(shape[1])).T - layer.bias[:, None]
    assert error(computed, decoded(layer)) < 1e-6
    assert error(site.weight(), decoded(layer)) < 1e-6


def test_a_method_sees_the_weight_of_an_8_bit_layer() -> None:
    layer = eight_bit()
    _, adapter = adapted(layer, perturb=False)
    assert error(adapter.sites[0].weight(), decoded(layer)) < 1e-6
    layer.train()(inputs(layer))  # moves the scales from the weight to the layer's state
    assert layer.weight.SCB is None
    assert error(adapter.sites[0].weight(), decoded(layer)) < 1e-6


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_that_are_stored_as_floats_are_still_codes(storage: torch.dtype) -> None:
    """quant_storage, which FSDP needs: the bytes of the codes under another type."""
    layer = four_bit(storage=storage)
    before, weight = stored(layer), decoded(layer)
    model, adapter = adapted(layer.train())
    assert error(adapter.sites[0].weight(), weight) < 1e-6
    unmerged = model(inputs(layer))
    adapter.merge()
    assert error(model(inputs(layer)), unmerged) < 1e-5
    adapter.detach()
    assert_same(stored(layer), before)


@pytest.mark.parametrize("layer", (LAYERS | ODD).values(), ids=LAYERS | ODD)
@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_the_model_as_it_was(method: str, layer: Callable[[], nn.Module]) -> None:
    module = layer().train()
    before = module(inputs(module))
    model, _ = adapted(module, method, perturb=False)
    torch.testing.assert_close(model(inputs(module)), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", (LAYERS | ODD).values(), ids=LAYERS | ODD)
@pytest.mark.parametrize("method", METHODS)
def test_forward_merge_and_unmerge(method: str, layer: Callable[[], nn.Module]) -> None:
    module = layer().train()
    cls, before, weight = type(module), stored(module), decoded(module)
    model, adapter = adapted(module, method)
    want, x = effective(adapter, weight), inputs(module)
    assert isinstance(module, cls)
    assert error(model(x), dense(module, want, x)) < 1e-5
    assert error(model(x), dense(module, weight, x)) > 0.005
    unmerged = model(x)
    with adapter.disabled():
        assert error(model(x), dense(module, weight, x)) < 1e-5
    for _ in range(2):
        adapter.merge()
        assert model[0] is module
        assert error(module.weight, want) < 1e-5
        assert error(model(x), unmerged) < 1e-5
        adapter.unmerge()
        assert isinstance(module, cls)
        assert model(x).equal(unmerged)
    adapter.detach()
    assert_same(stored(module), before)
    assert error(module(x), dense(module, weight, x)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16(method: str) -> None:
    layer = four_bit(dtype="bfloat16", compute="bfloat16").train()
    weight, before = decoded(layer), stored(layer)
    model, adapter = adapted(layer, method)
    x = inputs(layer, torch.bfloat16)
    want = dense(layer, effective(adapter, weight), x)
    assert model(x).dtype == torch.bfloat16
    assert error(model(x), want) < 0.01
    adapter.merge()
    assert error(model(x), want) < 0.01
    assert model(x).dtype == torch.bfloat16
    adapter.detach()
    assert_same(stored(layer), before)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_gradients_are_those_of_the_dense_weight(layer: Callable[[], nn.Module]) -> None:
    module = layer().train()
    weight = decoded(module)
    model, adapter = adapted(module)
    x = inputs(module).requires_grad_()
    model(x).square().sum().backward()
    a, b = (adapter.parts["0"].tensors()[name].detach().double().requires_grad_() for name in "AB")
    wide = x.detach().double().requires_grad_()
    dense(module, weight + ALPHA / RANK * b @ a, wide).square().sum().backward()
    for got, want in ((adapter.parts["0"].A.grad, a.grad), (adapter.parts["0"].B.grad, b.grad), (x.grad, wide.grad)):
        assert error(got, want) < 1e-5
    assert module.weight.grad is None


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_an_8_bit_layer_in_eval_rounds_its_inputs_alone(method: str) -> None:
    """There LLM.int8() has 8 bits for each input, too; merged, they are not rounded."""
    layer = eight_bit().eval()
    weight, before = decoded(layer), stored(layer)
    model, adapter = adapted(layer, method)
    want = dense(layer, effective(adapter, weight), inputs(layer))
    assert error(model(inputs(layer)), want) < 0.02
    adapter.merge()
    assert error(model(inputs(layer)), want) < 1e-5
    adapter.detach()
    assert error(model(inputs(layer)), dense(layer, weight, inputs(layer))) < 0.02
    assert_same(stored(layer), before)
