"""DoRA on every kind of layer, against the layer with the weight m·V/‖V‖ written out in float64, where V = W + s·B·A."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchgraft as tg
from dora_reference import adapted, leaves, move_, turned, weight_with
from models import Plain, perturb_
from one_layer import (
    ALPHA,
    DTYPES,
    LAYERS,
    NOT_EMBEDDINGS,
    ONE_OF_EACH,
    RANK,
    SCALE,
    TOKENS,
    Pair,
    as_stored,
    assert_near,
    canonical,
    dense,
    input_of,
    output,
    own_dtype,
    plain,
)
from references import bits, compiles


def reference(module: nn.Module, part: Any, x: Tensor, cotangent: Tensor) -> dict[str, Pair]:
    """Output and gradients in float64, each with the same from absolute values: the size of the terms that it sums."""
    weight, found = canonical(module), []
    norm = (weight + SCALE * part.B.detach().double() @ part.A.detach().double()).norm(dim=1)
    for view in (lambda tensor: tensor, torch.abs):
        a, b, m = (view(tensor.detach().double()).requires_grad_() for tensor in (part.A, part.B, part.m))
        bias = None if getattr(module, "bias", None) is None else view(module.bias.detach().double())
        own_x = view(x.detach().double()).requires_grad_() if x.is_floating_point() else x
        w, delta = view(weight), SCALE * b @ a
        if view is torch.abs:
            # What is computed: h + (g - 1)·(h - bias) + …, with a norm whose square is a sum of terms larger than itself.
            blown = (w.norm(dim=1) + delta.detach().norm(dim=1)).square() / norm.square()
            g = m / norm * blown
            matrix, bias = (2 + g)[:, None] * w + g[:, None] * delta, None if bias is None else (3 + g) * bias
        else:
            matrix = turned(w + delta, m)
        y = dense(module, as_stored(module, matrix), bias, own_x)
        inputs = {"A": a, "B": b, "m": m} | ({"x": own_x} if x.is_floating_point() else {})
        gradients = torch.autograd.grad(y, list(inputs.values()), view(cotangent.double()))
        found.append({"output": y.detach(), **dict(zip(inputs, gradients, strict=True))})
    return {key: (found[0][key], found[1][key]) for key in found[0]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_output_and_gradients_are_those_of_the_dense_weight(layer: str, dtype: str) -> None:
    module = plain(layer, dtype)
    model, adapter = adapted(module, dtype=own_dtype(dtype))
    part, x = adapter.parts["0"], input_of(module)
    x.requires_grad_(x.is_floating_point())
    got = model(x)
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(8)).to(got)
    if layer == "embedding-padding":
        cotangent[x == module.padding_idx] = 0  # to torch the row is a constant; here it is scaled by m, as in PEFT
    got.backward(cotangent)
    want = reference(module, part, x, cotangent)

    assert (got.dtype, part.m.dtype) == (DTYPES[dtype], DTYPES[own_dtype(dtype)])
    assert_near(got, want["output"], got.dtype)
    assert_near(part.A.grad, want["A"], part.A.dtype)
    assert_near(part.B.grad, want["B"], part.A.dtype)
    assert_near(part.m.grad, want["m"], got.dtype, part.m.dtype)
    if "x" in want:
        assert_near(x.grad, want["x"], x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_start_changes_no_bit_of_the_output(layer: str, dtype: str) -> None:
    module = plain(layer, dtype).requires_grad_(False)  # torch rounds in another order where a weight needs a gradient
    x = input_of(module)
    for own in ("float32", "bfloat16"):
        model = nn.Sequential(deepcopy(module))
        part = tg.apply(model, "dora", targets=["@all"], rank=2, dtype=own).parts["0"]
        assert (part.A.dtype, part.B.dtype, part.m.dtype) == (DTYPES[own], DTYPES[own], DTYPES[own_dtype(dtype)])
        torch.testing.assert_close(part.m.double(), canonical(module).norm(dim=1), rtol=1e-6, atol=0)
        for mode in (True, False):
            assert torch.equal(model.train(mode)(x), module(x))
            with torch.no_grad():
                assert torch.equal(model(x), module(x))


@pytest.mark.parametrize("layer", [*ONE_OF_EACH, "embedding-padding"])
def test_the_magnitude_alone_scales_each_output_feature(layer: str) -> None:
    """The (g - 1)·W·x that PEFT's Embedding once dropped: with B = 0 there is nothing else."""
    module = plain(layer)
    model = nn.Sequential(deepcopy(module))
    part = tg.apply(model, "dora", targets=["@all"], rank=2).parts["0"]
    factor = torch.linspace(-1, 3, len(part.m))
    part.m.data *= factor
    x = input_of(module)
    want = output(module, factor.double()[:, None] * canonical(module), x)
    torch.testing.assert_close(model(x).double(), want, atol=1e-5, rtol=1e-5)


def test_the_padding_row_of_an_embedding_stays_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=3))
    adapter = tg.apply(model, "dora", targets=["@all"], rank=2)
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=0.1, weight_decay=0.1))
    for _ in range(4):
        optimizer.zero_grad()
        (model(TOKENS) - 1).square().mean().backward()
        optimizer.step()
    assert not adapter.parts["0"].A[:, 3].any()
    assert not model(torch.tensor([3])).any()
    assert model(torch.tensor([2])).abs().min() > 0
    adapter.merge()
    assert not model[0].weight[3].any()


@pytest.mark.parametrize("layer", NOT_EMBEDDINGS)
def test_in_training_all_of_the_change_sees_the_input_under_one_mask(layer: str) -> None:
    """h = W·x + (W' - W)·drop(x), as in the authors' code; in eval nothing is dropped."""
    module = plain(layer)
    model, adapter = adapted(module, dropout=0.4)
    part, x = adapter.parts["0"], input_of(module)
    torch.manual_seed(11)
    trained = model.train()(x)
    torch.manual_seed(11)
    dropped = F.dropout(x, 0.4).double()
    w, (a, b, m) = canonical(module), leaves(part, "A", "B", "m")
    change = as_stored(module, turned(w + SCALE * b @ a, m) - w)
    want = output(module, w, x) + dense(module, change, None, dropped)
    torch.testing.assert_close(trained.double(), want, atol=1e-4, rtol=0)
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(8))
    trained.backward(cotangent)
    for name, gradient in zip("ABm", torch.autograd.grad(want, [a, b, m], cotangent.double()), strict=True):
        torch.testing.assert_close(getattr(part, name).grad.double(), gradient, atol=1e-4, rtol=1e-4)

    whole = output(module, w, x) + dense(module, change, None, x.double())
    torch.testing.assert_close(model.eval()(x).double(), whole, atol=1e-4, rtol=0)
    assert (want - whole).abs().max() > 0.1, "the dropped entries must matter"


def test_dropout_of_an_embedding_falls_on_the_columns_that_were_looked_up() -> None:
    module = plain("embedding")
    model, adapter = adapted(module, dropout=0.4)
    part, tokens = adapter.parts["0"], input_of(module)
    torch.manual_seed(11)
    trained = model.train()(tokens)
    torch.manual_seed(11)
    columns = F.dropout(part.A.detach().T[tokens], 0.4).double()
    b, m = part.B.detach().double(), part.m.detach().double()
    g = m / (canonical(module) + SCALE * b @ part.A.double()).norm(dim=1)
    want = g * (module.weight[tokens].double() + SCALE * columns @ b.T)
    torch.testing.assert_close(trained.double(), want, atol=1e-5, rtol=0)
    whole = output(module, weight_with(part, canonical(module)), tokens)
    torch.testing.assert_close(model.eval()(tokens).double(), whole, atol=1e-5, rtol=0)
    assert (want - whole).abs().max() > 0.1


def model_of_all_kinds(**options: Any) -> tuple[Plain, Plain, tg.Adapter]:
    """Without an adapter, with one, and that one."""
    torch.manual_seed(0)
    base = Plain().eval().requires_grad_(False)
    perturb_(list(base.parameters()), 0.1)
    model = deepcopy(base)
    adapter = tg.apply(model, "dora", targets=["@all"], **{"rank": RANK, "alpha": ALPHA, **options})
    perturb_(adapter.parameters(), 0.2)
    return base, model, adapter


def dense_twin(base: nn.Module, adapter: tg.Adapter) -> nn.Module:
    twin = deepcopy(base).double()
    for name, part in adapter.parts.items():
        module = twin.get_submodule(name)
        module.weight.data = as_stored(module, weight_with(part, canonical(module))).clone()
    return twin


def test_a_whole_model_is_its_dense_twin_and_so_are_its_copies() -> None:
    base, model, adapter = model_of_all_kinds()
    want = dense_twin(base, adapter)(TOKENS)
    with torch.no_grad():
        model(TOKENS)  # so that there is something cached
    for other in (model, deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(TOKENS).double(), want, atol=1e-4, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(other(TOKENS).double(), want, atol=1e-4, rtol=0)
    copy = deepcopy(model)
    perturb_(tg.adapters(copy)["default"].parameters(), 0.2, seed=7)
    with torch.no_grad():
        torch.testing.assert_close(copy(TOKENS).double(), dense_twin(base, tg.adapters(copy)["default"])(TOKENS), atol=1e-4, rtol=0)
        torch.testing.assert_close(model(TOKENS).double(), want, atol=1e-4, rtol=0)
    with adapter.disabled():
        assert torch.equal(model(TOKENS), base(TOKENS))
    keys = {f"{name}.adapters.default.{tensor}" for name in adapter.parts for tensor in "ABm"}
    assert model.state_dict().keys() == base.state_dict().keys() | keys


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # by inductor itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@compiles
def test_compiles_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    base = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 10))
    model = deepcopy(base)
    adapter = tg.apply(model, "dora", targets=["@all"], rank=RANK, alpha=ALPHA)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in (1, 2):
        perturb_(adapter.parameters(), 0.2, seed)
        want = dense_twin(base, adapter)(TOKENS)
        for guard in (torch.no_grad, torch.enable_grad):
            with guard():
                got = compiled(TOKENS)
                torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)
    got.square().mean().backward()
    compiled_gradients = [parameter.grad for parameter in adapter.parameters()]
    model.zero_grad()
    model(TOKENS).square().mean().backward()
    for found, parameter in zip(compiled_gradients, adapter.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, atol=1e-5, rtol=1e-4)


def test_under_autocast_the_output_is_the_same_to_bfloat16() -> None:
    base, model, adapter = model_of_all_kinds()
    want = dense_twin(base, adapter)(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(TOKENS)
        got.square().mean().backward()
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() / want.norm() < 8 * torch.finfo(torch.bfloat16).eps
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in adapter.parameters())


def test_the_magnitude_has_no_weight_decay_and_the_factors_have_their_own_rates() -> None:
    _, _, adapter = model_of_all_kinds(lr_scale_a=0.5, lr_scale_b=16.0, lr_scale_embedding=3.0)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in adapter.param_groups(lr=0.01, weight_decay=0.1) for p in g["params"]}
    assert len(rates) == len(adapter.parameters())
    for name, part in adapter.parts.items():
        a, b = (0.03, 0.03) if name == "embed" else (0.005, 0.16)
        found = [rates[id(tensor)] for tensor in (part.A, part.B, part.m)]
        assert found == [(pytest.approx(a), 0.1), (pytest.approx(b), 0.1), (0.01, 0.0)], name


@pytest.mark.parametrize("init", ["swapped", "orthogonal", "gaussian", "pissa", "both-gaussian"])
@pytest.mark.parametrize("layer", ONE_OF_EACH)
@pytest.mark.filterwarnings("ignore:init both-gaussian")
def test_the_ways_to_start(layer: str, init: str) -> None:
    module = plain(layer).requires_grad_(False)
    model = nn.Sequential(deepcopy(module))
    adapter = tg.apply(model, "dora", targets=["@all"], rank=2, alpha=6, init=init)
    part, x, w = adapter.parts["0"], input_of(module), canonical(module)
    torch.testing.assert_close(part.m.double(), w.norm(dim=1), rtol=1e-6, atol=0)
    assert (part.A.any(), part.B.any()) == (init != "swapped", init in ("swapped", "pissa", "both-gaussian"))

    def want() -> Tensor:
        a, b, m = leaves(part, "A", "B", "m")
        began = part.B0.double() @ part.A0.double() if init == "pissa" else 0
        return output(module, turned(w + 3.0 * (b @ a - began), m), x)

    if init in ("swapped", "orthogonal", "gaussian"):
        assert torch.equal(model(x), module(x))
    torch.testing.assert_close(model(x).double(), want(), atol=1e-4, rtol=1e-4)
    difference = (want() - module(x)).abs().max()
    assert difference > 0.1 if init == "both-gaussian" else difference < 1e-4
    move_(adapter)
    torch.testing.assert_close(model(x).double(), want(), atol=1e-4, rtol=1e-4)
    before = bits(model[0].weight)
    adapter.merge()
    torch.testing.assert_close(model(x).double(), want(), atol=1e-4, rtol=1e-4)
    adapter.unmerge()
    assert torch.equal(bits(model[0].weight), before)


def test_both_gaussian_warns() -> None:
    with pytest.warns(tg.TorchgraftWarning, match=r"both-gaussian.*output changes before any training"):
        tg.apply(nn.Sequential(nn.Linear(6, 10)), "dora", init="both-gaussian", rank=2, targets=["@all"])
