"""The norm of DoRA: it equals that of the dense matrix, is computed once in evaluation, and is never out of date."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import example, given, strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchgraft as tg
from dora_reference import adapted, move_, norms_counted, weight_with
from one_layer import ALPHA, DTYPES, ONE_OF_EACH, RANK, SCALE, as_stored, canonical, input_of, output, plain
from torchgraft_plugins import dora


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", ONE_OF_EACH)
def test_zero_rows_train_and_merge_without_nan(layer: str, dtype: str) -> None:
    module = plain(layer, dtype)
    rows = torch.tensor([1, 3])
    with torch.no_grad():
        module.weight.copy_(as_stored(module, canonical(module).index_fill(0, rows, 0)))
    model = nn.Sequential(deepcopy(module))
    adapter = tg.apply(model, "dora", targets=["@all"], rank=RANK, alpha=ALPHA)
    part, x, before = adapter.parts["0"], input_of(module), module.weight.detach().clone()
    assert torch.equal(model(x), module(x))
    adapter.merge()
    assert model[0].weight.isfinite().all()
    adapter.unmerge()
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=0.05))
    for step in range(6):
        optimizer.zero_grad()
        (model(x) - 1).float().square().mean().backward()
        for name, parameter in adapter.named_parameters():
            assert parameter.grad.isfinite().all(), name
        if step == 0:
            assert (part.B.grad[rows].abs().amax(1) > 0).all(), "without it the row could never train"
        optimizer.step()

    got, want = model(x).detach(), weight_with(part, canonical(module))
    eps = torch.finfo(DTYPES[dtype]).eps
    assert (want[rows].norm(dim=1) > 0.01).all()
    torch.testing.assert_close(got.double(), output(module, want, x), atol=20 * eps, rtol=20 * eps)
    adapter.merge()
    torch.testing.assert_close(canonical(model[0]), want, atol=4 * eps, rtol=4 * eps)
    torch.testing.assert_close(model(x).double(), got.double(), atol=20 * eps, rtol=20 * eps)
    adapter.unmerge()
    assert torch.equal(model[0].weight, before)


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    rank=st.integers(1, 9),
    scales=st.tuples(*[st.floats(1e-3, 1e3)] * 3),
    seed=st.integers(0, 2**32),
)
@example(shape=(4, 4), rank=8, scales=(1e-9, 1.0, 1.0), seed=0)
@example(shape=(4, 4), rank=8, scales=(1.0, 1e-9, 1.0), seed=0)
def test_the_factored_norm_is_the_norm_of_the_dense_matrix(
    shape: tuple[int, int], rank: int, scales: tuple[float, float, float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, a, b = (
        scale * torch.randn(size, generator=generator, dtype=torch.float64)
        for scale, size in zip(scales, (shape, (rank, shape[1]), (shape[0], rank)), strict=True)
    )
    model = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=torch.float64))
    model[0].weight.data.copy_(w)
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.LowRankConfig, "advise", lambda *_: "")  # that a rank is more than is useful
        part = tg.apply(model, "dora", targets=["@all"], rank=rank, alpha=ALPHA, dtype="float64").parts["0"]
    part.A.data.copy_(a)
    part.B.data.copy_(b)
    s = ALPHA / rank
    found, want = dora._norm(part.site, part.config, part.tensors()), (w + s * b @ a).norm(dim=1)
    terms = (w.abs() + s * b.abs() @ a.abs()).square().sum(1)  # of the norm's square: they can cancel
    assert ((found.square() - want.square()).abs() <= 100 * torch.finfo(torch.float64).eps * terms).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_row_that_the_adapter_cancels_gives_no_nan(seed: int) -> None:
    """There ‖V‖² is a difference of equal terms, and rounding can make it negative."""
    module = plain("linear")
    model, adapter = adapted(module)
    move_(adapter, seed)
    part, x = adapter.parts["0"], input_of(module)
    model[0].weight.data.copy_(-SCALE * part.B.detach() @ part.A.detach())
    model(x).square().mean().backward()
    for name, tensor in {"output": model(x), **{name: parameter.grad for name, parameter in adapter.named_parameters()}}.items():
        assert tensor.isfinite().all(), name


class Products(TorchDispatchMode):
    """Records the shapes of all results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket._qualified_op_name.removeprefix("aten::") in {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum"}:
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("layer", ["linear", "hf-conv1d", "embedding", "conv2d-plain"])
def test_a_training_step_never_multiplies_b_by_a(layer: str, init: str) -> None:
    module = plain(layer)
    model, adapter = adapted(module, init=init, rank=2)
    part, (out, into) = adapter.parts["0"], canonical(module).shape
    x = input_of(module)
    with Products() as products:
        model.train()(x).square().mean().backward()
    assert products.shapes
    assert not products.shapes & {(out, into), (into, out)}
    with Products() as products:
        part.B @ part.A
    assert products.shapes == {(out, into)}, "it would have been seen"


Change = Callable[[nn.Sequential, tg.Adapter, Tensor], object]


def train(name: str, *, look: bool = False) -> Change:
    """Two steps of an optimizer; with `look`, an eval falls between the forward pass and the step."""

    def change(model: nn.Sequential, adapter: tg.Adapter, x: Tensor) -> None:
        optimizer = adapter.optimizer(name, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if look:
                with torch.no_grad():
                    model(x)
            loss.backward()
            optimizer.step()

    return change


def load_other_values(model: nn.Sequential, adapter: tg.Adapter, assign: bool) -> None:
    model.load_state_dict({key: value + 0.3 if "adapters" in key else value for key, value in model.state_dict().items()}, assign=assign)


def edit_base(model: nn.Sequential, adapter: tg.Adapter, x: Tensor) -> None:
    with torch.no_grad():
        model[0].weight[1:3] += 1


def average_by_hand(model: nn.Sequential, adapter: tg.Adapter, x: Tensor) -> None:
    """As moving averages of weights are put in: past torch's count of changes."""
    for parameter in adapter.parameters():
        parameter.data.copy_(0.9 * parameter.data)
    model.eval()


def values_by_hand(model: nn.Sequential, adapter: tg.Adapter, x: Tensor) -> None:
    """Of an adapter that is not trained any more."""
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    average_by_hand(model, adapter, x)


CHANGES: dict[str, Change] = {
    "adamw": train("adamw"),
    "sgd": train("sgd"),
    "bitsandbytes": train("adamw_32bit"),
    "bitsandbytes, 8 bit": train("adamw_8bit"),
    "torch, with an eval before the step": train("adamw", look=True),
    "bitsandbytes, with an eval before the step": train("adamw_32bit", look=True),
    "load_state_dict": lambda model, adapter, x: load_other_values(model, adapter, False),
    "load_state_dict, assigned": lambda model, adapter, x: load_other_values(model, adapter, True),
    "base edited in place": edit_base,
    "averages copied by hand": average_by_hand,
    "values of a frozen adapter copied by hand": values_by_hand,
}


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_in_eval_the_norm_is_computed_once_and_never_out_of_date(
    change: str, guard: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = adapted(plain("linear"))
    model.eval()
    part, x = adapter.parts["0"], input_of(model[0])
    with norms_counted(monkeypatch) as calls:
        for turn in range(2):
            if turn:
                CHANGES[change](model, adapter, x)
                calls.clear()
            with guard():
                outputs = [model(x) for _ in range(3)]
            want = output(model[0], weight_with(part, canonical(model[0])), x)
            for got in outputs:
                torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)
            assert calls == [part.site]


def test_a_norm_from_inference_mode_does_not_hinder_training() -> None:
    model, adapter = adapted(plain("linear"))
    x = input_of(model[0]).requires_grad_()
    for trained in (True, False):
        for parameter in adapter.parameters():
            parameter.requires_grad_(trained)
        with torch.inference_mode():
            model.eval()(x.detach())
        model.train()(x).sum().backward()
        want = torch.ones(10, dtype=torch.float64) @ weight_with(adapter.parts["0"], canonical(model[0]))
        torch.testing.assert_close(x.grad.double(), want.expand_as(x), atol=1e-4, rtol=0)
        x.grad = None
