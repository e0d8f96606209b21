"""LoRA on every kind of layer, against the layer with the weight W + s·B·A written out in float64."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchgraft as tg
from models import perturb_
from one_layer import (
    DTYPES,
    LAYERS,
    ONE_OF_EACH,
    PLAIN_SITES,
    SCALE,
    SCALES,
    TOKENS,
    adapted,
    as_stored,
    assert_near,
    dense,
    input_of,
    plain,
    plain_model,
    reference,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_output_and_gradients_are_those_of_the_dense_weight(layer: str, dtype: str) -> None:
    module = plain(layer, dtype)
    model, adapter = adapted(module, dtype="float64" if dtype == "float64" else "float32")
    part, x = adapter.parts["0"], input_of(module)
    x.requires_grad_(x.is_floating_point())
    got = model(x)
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(8)).to(got)
    got.backward(cotangent)
    want = reference(module, part, x, cotangent)

    assert got.dtype == DTYPES[dtype]
    assert_near(got, want["output"], got.dtype)
    assert_near(part.A.grad, want["A"], part.A.dtype)
    assert_near(part.B.grad, want["B"], part.A.dtype)
    if "x" in want:
        assert_near(x.grad, want["x"], x.dtype)


@pytest.mark.parametrize("reader", ["torchgraft", "peft's files alone"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_saved_adapter_computes_the_same_after_loading(layer: str, reader: str, tmp_path: Path) -> None:
    module = plain(layer)
    _, saved = adapted(module)
    saved.save(tmp_path)
    if reader != "torchgraft":
        (tmp_path / "torchgraft.json").unlink()
    model = nn.Sequential(deepcopy(module))
    loaded = tg.load(model, tmp_path)

    x = input_of(module)
    assert_near(model(x), reference(module, saved.parts["0"], x)["output"], torch.float32)
    assert not torch.equal(model(x), module(x))
    for name in ("A", "B"):
        torch.testing.assert_close(getattr(loaded.parts["0"], name), getattr(saved.parts["0"], name), rtol=0, atol=0)


@pytest.mark.parametrize("scaling", SCALES)
@pytest.mark.parametrize("layer", ONE_OF_EACH)
def test_scaling_holds_in_forward_merge_and_files(layer: str, scaling: str, tmp_path: Path) -> None:
    module = plain(layer)
    model, adapter = adapted(module, scaling=scaling)
    x = input_of(module)
    want = reference(module, adapter.parts["0"], x, scale=SCALES[scaling])["output"]
    assert_near(model(x), want, torch.float32)
    adapter.merge()
    assert_near(model(x), want, torch.float32)
    adapter.unmerge()
    adapter.save(tmp_path)
    for leave_out in (None, "torchgraft.json"):
        if leave_out:
            (tmp_path / leave_out).unlink()
        again = nn.Sequential(deepcopy(module))
        tg.load(again, tmp_path)
        assert_near(again(x), want, torch.float32)


@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", ONE_OF_EACH)
def test_the_adapter_has_its_own_dtype_and_the_output_the_layers(layer: str, dtype: str, own: str, tmp_path: Path) -> None:
    module = plain(layer, dtype)
    model, adapter = adapted(module, dtype=own)
    part, x = adapter.parts["0"], input_of(module)
    got = model(x)
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(8)).to(got)
    got.backward(cotangent)
    want = reference(module, part, x, cotangent)

    assert (part.A.dtype, part.B.dtype, got.dtype) == (DTYPES[own], DTYPES[own], DTYPES[dtype])
    assert_near(got, want["output"], DTYPES[dtype], DTYPES[own])
    assert_near(part.A.grad, want["A"], DTYPES[own], torch.float32)
    assert_near(part.B.grad, want["B"], DTYPES[own], torch.float32)
    adapter.save(tmp_path)
    loaded = tg.load(nn.Sequential(deepcopy(module)), tmp_path).parts["0"]
    assert loaded.A.dtype == DTYPES[own]
    assert torch.equal(loaded.A, part.A)
    assert torch.equal(loaded.B, part.B)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (2, 3, 4, 6)])
def test_any_leading_shape_of_a_linear(shape: tuple[int, ...]) -> None:
    module = plain("linear")
    model, adapter = adapted(module)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert_near(model(x), reference(module, adapter.parts["0"], x)["output"], torch.float32)


@pytest.mark.parametrize("layer", ["conv1d-circular", "conv2d-groups", "conv3d-plain"])
def test_a_convolution_without_batch_and_in_channels_last(layer: str) -> None:
    module = plain(layer)
    model, adapter = adapted(module)
    x = input_of(module)
    want, size = reference(module, adapter.parts["0"], x)["output"]
    assert_near(model(x[0]), (want[0], size[0]), torch.float32)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats:
        model.to(memory_format=formats[x.dim()])
        assert_near(model(x.contiguous(memory_format=formats[x.dim()])), (want, size), torch.float32)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if not layer.startswith("embedding")])
def test_dropout_falls_on_the_inputs_of_a_in_training_only(layer: str) -> None:
    module = plain(layer)
    model, adapter = adapted(module, dropout=0.4)
    part, x = adapter.parts["0"], input_of(module)
    base, whole = module(x).double(), update_alone(module, part, x)
    torch.manual_seed(11)
    trained = model.train()(x)
    torch.manual_seed(11)
    update = update_alone(module, part, F.dropout(x, 0.4))

    torch.testing.assert_close(trained.double(), base + update, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.eval()(x).double(), base + whole, atol=1e-4, rtol=0)
    assert (update - whole).abs().max() > 0.1, "the dropped entries must matter"


def update_alone(module: nn.Module, part: Any, x: Tensor) -> Tensor:
    """s·B·A without the layer, in float64."""
    product = part.B.detach().double() @ part.A.detach().double()
    return dense(module, as_stored(module, SCALE * product), None, x.double())


def test_dropout_of_an_embedding_falls_on_the_columns_that_were_looked_up() -> None:
    module = plain("embedding")
    model, adapter = adapted(module, dropout=0.4)
    a, b = (getattr(adapter.parts["0"], name).detach() for name in "AB")
    tokens = input_of(module)
    torch.manual_seed(11)
    trained = model.train()(tokens)
    torch.manual_seed(11)
    columns = F.dropout(a.T[tokens], 0.4)
    want = module.weight[tokens].double() + SCALE * columns.double() @ b.double().T
    torch.testing.assert_close(trained.double(), want, atol=1e-5, rtol=0)
    assert_near(model.eval()(tokens), reference(module, adapter.parts["0"], tokens)["output"], torch.float32)


@pytest.mark.parametrize("layer", ["linear", "hf-conv1d", "embedding", "conv1d-groups"])
def test_dropout_leaves_the_expected_output_as_it_is(layer: str) -> None:
    module = plain(layer)
    model, _ = adapted(module, dropout=0.3)
    x, runs = input_of(module)[:1], 4000
    expected = model.eval()(x)
    torch.manual_seed(2)
    with torch.no_grad():
        outputs = model.train()(x.repeat(runs, *(1,) * (x.dim() - 1))).double()
    error, deviation = outputs.mean(0) - expected[0].double(), outputs.std(0)
    assert deviation.min() > 0.01, "dropout must do something"
    assert (error.abs() <= 5 * deviation / runs**0.5).all()


def dense_twin(base: nn.Module, adapter: tg.Adapter, scales: dict[str, float]) -> nn.Module:
    """`base` in float64 with W + s·B·A in the place of each W."""
    twin = deepcopy(base).double()
    for name, scale in scales.items():
        part, module = adapter.parts[name], twin.get_submodule(name)
        product = part.B.detach().double() @ part.A.detach().double()
        module.weight.data += as_stored(module, scale * product)
    return twin


PLAIN_SCALES = dict.fromkeys(PLAIN_SITES, SCALE)


def test_a_whole_model_is_its_dense_twin() -> None:
    base, model, adapter = plain_model()
    assert tuple(adapter.parts) == PLAIN_SITES
    want = dense_twin(base, adapter, PLAIN_SCALES)(TOKENS)
    torch.testing.assert_close(model(TOKENS).double(), want, atol=1e-4, rtol=0)
    with adapter.disabled():
        assert torch.equal(model(TOKENS), base(TOKENS))
    torch.testing.assert_close(model(TOKENS).double(), want, atol=1e-4, rtol=0)


OVERRIDES: dict[str, dict[str, Any]] = {
    "@linear": {"rank": 2},
    "mlp.*": {"rank": 4, "alpha": 3.0},
    "*.0": {"alpha": 7.0, "scaling": "none"},
    "head": {"alpha": 1},
}
RANKS_AND_SCALES = dict(  # what the table above says when read by hand: later patterns win, option by option
    zip(PLAIN_SITES, [(3, 5 / 3), (3, 5 / 3), (2, 5 / 2), (2, 5 / 2), (4, 1.0), (4, 3 / 4), (3, 1 / 3)], strict=True)
)


@pytest.mark.parametrize("reader", ["torchgraft", "peft's files alone"])
def test_overlapping_overrides_hold_per_site_and_survive_files(reader: str, tmp_path: Path) -> None:
    base, model, adapter = plain_model(overrides=OVERRIDES)
    want = dense_twin(base, adapter, {name: scale for name, (_, scale) in RANKS_AND_SCALES.items()})(TOKENS)
    assert not torch.allclose(dense_twin(base, adapter, PLAIN_SCALES)(TOKENS), want, atol=0.05)
    adapter.save(tmp_path)
    if reader != "torchgraft":
        (tmp_path / "torchgraft.json").unlink()
    again = deepcopy(base)
    for found, output in ((adapter, model(TOKENS)), (tg.load(again, tmp_path), again(TOKENS))):
        assert {name: len(part.A) for name, part in found.parts.items()} == {name: rank for name, (rank, _) in RANKS_AND_SCALES.items()}
        torch.testing.assert_close(output.double(), want, atol=1e-4, rtol=0)


def test_two_adapters_add_up() -> None:
    base, model, first = plain_model()
    second = tg.apply(model, "lora", targets=["head", "conv"], rank=2, alpha=4, name="second")
    perturb_(second.parameters(), seed=4)
    both = dense_twin(dense_twin(base, first, PLAIN_SCALES), second, {"head": 2.0, "conv": 2.0})
    torch.testing.assert_close(model(TOKENS).double(), both(TOKENS), atol=1e-4, rtol=0)
    tg.activate(model, "second")
    alone = dense_twin(base, second, {"head": 2.0, "conv": 2.0})
    torch.testing.assert_close(model(TOKENS).double(), alone(TOKENS), atol=1e-4, rtol=0)


def test_under_autocast_the_output_is_the_same_to_bfloat16() -> None:
    base, model, adapter = plain_model()
    want = dense_twin(base, adapter, PLAIN_SCALES)(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(TOKENS)
        got.square().mean().backward()
    error = (got.double() - want).norm() / want.norm()
    assert got.dtype == torch.bfloat16
    assert error < 4 * torch.finfo(torch.bfloat16).eps
    assert (base(TOKENS).double() - want).norm() / want.norm() > 0.3, "the adapter must be more than that error"
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # by inductor itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"init": "pissa"}], ids=["plain", "dropout", "pissa"])
def test_compiles_without_a_graph_break(backend: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    base, model, adapter = plain_model(**options)
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    want = model(TOKENS)
    torch.testing.assert_close(compiled(TOKENS), want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(base(TOKENS), want, atol=0.05)
    compiled.train()(TOKENS).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in adapter.parameters())
    compiled.eval()
    with adapter.disabled():
        torch.testing.assert_close(compiled(TOKENS), base(TOKENS), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(compiled(TOKENS), want, atol=1e-5, rtol=1e-4)
