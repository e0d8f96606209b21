"""AdaLoRA by the energy of the update, against the dense SVD of B·A in float64; and what any optimizer has to follow."""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchgraft as tg
from models import perturb_
from moments import MEANS, OPTIMIZERS, SQUARES
from one_layer import LAYERS, TOKENS, as_stored, assert_near, dense, input_of, plain, plain_model

RANK, ALPHA = 3, 5.0
SCALE = ALPHA / RANK
OPTIONS: dict[str, dict[str, Any]] = {
    "energy": {"interval": 1, "epsilon": 1e-3},
    "budget": {"allocator": "budget", "total_steps": 3, "target_rank": 2},
    "budget to rank 0": {"allocator": "budget", "total_steps": 3, "target_rank": 0},
}
NOT_THREE_DIMENSIONAL = [layer for layer in LAYERS if not layer.startswith("conv3d")]
ABOVE_FULL = "ignore:.*is more than min:torchgraft.TorchgraftWarning"
Pair = tuple[Tensor, Tensor]


def reduced(module: nn.Module, allocator: str, **options: Any) -> tuple[nn.Sequential, tg.Adapter]:
    """A model of a copy of that layer, whose adapter a step has taken from rank 3 to 2 or 0."""
    model = nn.Sequential(deepcopy(module))
    adapter = tg.apply(model, "adalora", ["@all"], rank=RANK, alpha=ALPHA, **OPTIONS[allocator], **options)
    perturb_(adapter.parameters())
    part = adapter.parts["0"]
    part.B.data[:, 1] *= 1e-3
    if getattr(module, "padding_idx", None) is not None:
        part.A.data[:, module.padding_idx] = 0
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    model(input_of(module)).float().square().sum().backward()
    adapter.step(optimizer, step=2)
    optimizer.zero_grad()
    assert part.config.r == part.A.shape[0] == part.B.shape[1] == (0 if allocator == "budget to rank 0" else 2)
    return model, adapter


def change(part: Any) -> Tensor:
    """P·Λ·Q or B·A in float64."""
    a, b = part.A.detach().double(), part.B.detach().double()
    return b @ (part.E.detach().double() * a) if hasattr(part, "E") else b @ a


def reference(module: nn.Module, part: Any, x: Tensor, cotangent: Tensor) -> dict[str, Pair]:
    """Output and gradients in float64, each with the same from absolute values: the size of the terms that it sums."""

    def compute(view: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        own = {name: view(p.detach().double()).requires_grad_() for name, p in part.named_parameters()}
        weight, bias = (None if p is None else view(p.detach().double()) for p in (module.weight, getattr(module, "bias", None)))
        own_x = view(x.detach().double()).requires_grad_() if x.is_floating_point() else x
        product = own["B"] @ torch.diag(own["E"][:, 0]) @ own["A"] if "E" in own else own["B"] @ own["A"]
        output = dense(module, weight + SCALE * as_stored(module, product), bias, own_x)
        inputs = own | ({"x": own_x} if x.is_floating_point() else {})
        gradients = torch.autograd.grad(output, list(inputs.values()), view(cotangent.double()))
        return {"output": output.detach(), **dict(zip(inputs, gradients, strict=True))}

    values, sizes = compute(lambda tensor: tensor), compute(torch.abs)
    return {key: (values[key], sizes[key]) for key in values}


@pytest.mark.filterwarnings(ABOVE_FULL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("allocator", OPTIONS)
@pytest.mark.parametrize("layer", NOT_THREE_DIMENSIONAL)
def test_after_a_change_of_rank_output_and_gradients_are_those_of_the_dense_weight(layer: str, allocator: str, dtype: str) -> None:
    module = plain(layer, dtype)
    model, adapter = reduced(module, allocator)
    part, x = adapter.parts["0"], input_of(module)
    x.requires_grad_(x.is_floating_point() and part.config.r > 0)
    got = model(x)
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(8)).to(got)
    want = reference(module, part, x, cotangent)
    assert_near(got, want["output"], got.dtype)
    if part.config.r:
        got.backward(cotangent)
        for name, parameter in part.named_parameters():
            assert_near(parameter.grad, want[name], torch.float32)
        assert_near(x.grad, want["x"], x.dtype) if "x" in want else None
    if getattr(module, "padding_idx", None) is not None:
        assert not part.A[:, module.padding_idx].any()


@pytest.mark.filterwarnings(ABOVE_FULL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("allocator", OPTIONS)
@pytest.mark.parametrize("layer", NOT_THREE_DIMENSIONAL)
@torch.no_grad()
def test_after_a_change_of_rank_merging_keeps_the_function_and_unmerging_gives_the_bits_back(
    layer: str, allocator: str, dtype: str
) -> None:
    module = plain(layer, dtype)
    with torch.enable_grad():
        model, adapter = reduced(module, allocator)
    x = input_of(module)
    want, size = reference_output(module, adapter.parts["0"], x)
    unmerged = model(x)
    adapter.merge()
    assert_near(model(x), (want, size), unmerged.dtype)
    if dtype == "float32":
        assert (model(x) - unmerged).norm() <= 1e-5 * unmerged.norm()
    adapter.unmerge()
    assert torch.equal(model[0].weight, module.weight)
    assert torch.equal(model(x), unmerged)


def reference_output(module: nn.Module, part: Any, x: Tensor) -> Pair:
    with torch.enable_grad():
        shape = module(x).shape
        return reference(module, part, x, torch.zeros(shape))["output"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("allocator", ["energy", "budget"])
@torch.no_grad()
def test_merging_into_files_is_the_dense_weight_and_unmerging_gives_the_files_back(
    allocator: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = plain_model()[0].to(dtype)
    model = deepcopy(base)
    adapter = tg.apply(model, "adalora", ["@all"], rank=4, alpha=ALPHA, overrides={"head": {"alpha": 2.0}}, **OPTIONS[allocator])
    with torch.enable_grad():
        perturb_(adapter.parameters(), 0.2)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
        for part in adapter.parts.values():
            part.B.data[:, 2] *= 1e-3
        model(TOKENS).float().sum().backward()
        adapter.step(optimizer, step=2)
    assert len({part.config.r for part in adapter.parts.values()}) > 1 or allocator == "energy"
    adapter.save(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in base.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    kinds = {"embed": "Embedding"}
    tg.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", kinds=kinds)
    tg.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, part in adapter.parts.items():
        module = base.get_submodule(name)
        want = module.weight.double() + (2.0 if name == "head" else ALPHA) / 4 * as_stored(module, change(part))
        torch.testing.assert_close(merged[f"{name}.weight"].double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


# Energy: which rank, and what becomes of B·A.


@st.composite
def low_rank_updates(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """B (d, r) and A (r, k) whose product has a drawn spectrum, in a basis that is not its singular one."""
    d, k, r = draw(st.integers(2, 9)), draw(st.integers(2, 9)), draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    drawn = draw(st.lists(st.floats(-4, 1), min_size=min(d, k, r), max_size=min(d, k, r)))
    values = torch.zeros(r, dtype=torch.float64)
    values[: len(drawn)] = 10 ** torch.tensor(drawn, dtype=torch.float64)
    u, v = torch.zeros(d, r, dtype=torch.float64), torch.zeros(r, k, dtype=torch.float64)
    for target, size in ((u, d), (v.T, k)):
        square = torch.randn(size, size, generator=generator, dtype=torch.float64)
        target[:, : min(size, r)] = torch.linalg.qr(square).Q[:, : min(size, r)]
    mix = torch.randn(r, r, generator=generator, dtype=torch.float64) + 3 * torch.eye(r, dtype=torch.float64)
    return (u * values @ mix).float(), torch.linalg.solve(mix, v).float()


def energy_model(b: Tensor, a: Tensor, **options: Any) -> tuple[nn.Sequential, tg.Adapter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(a.shape[1], b.shape[0]))
    adapter = tg.apply(model, "adalora", ["@all"], rank=len(a), **{"interval": 1, **options})
    adapter.parts["0"].A.data, adapter.parts["0"].B.data = a.clone(), b.clone()
    return model, adapter, torch.optim.SGD(adapter.parameters(), lr=0.1)


@pytest.mark.filterwarnings(ABOVE_FULL)
@settings(max_examples=150)
@given(low_rank_updates(), st.floats(0, 0.6), st.sampled_from([None, 0, 1, 2, 4]))
def test_the_rank_is_the_least_whose_dropped_energy_is_within_epsilon_and_the_update_is_truncated_there(
    update: tuple[Tensor, Tensor], epsilon: float, min_rank: int | None
) -> None:
    b, a = update
    u, sigma, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    share = torch.cat([sigma.square().flip(0).cumsum(0).flip(0), torch.zeros(1).double()]) / sigma.square().sum()
    assume(((share - epsilon).abs() > 1e-9).logical_or(share == 0).all())
    assume(sigma[min(len(a), len(sigma)) - 1] > 1e-6 * sigma[0] or epsilon > 1e-9)
    assume(min_rank is None or min_rank <= min(2 * len(a), len(sigma)))
    least = next(k for k in range(len(share)) if share[k] <= epsilon)
    want = max(least, 1 if min_rank is None else min_rank)
    _, adapter, optimizer = energy_model(b, a, epsilon=epsilon, min_rank=min_rank)
    part = adapter.parts["0"]
    adapter.step(optimizer, step=1)
    assert part.config.r == part.A.shape[0] == part.B.shape[1] == min(want, len(a))
    if want >= len(a):
        assert torch.equal(part.A, a)
        assert torch.equal(part.B, b)
    elif want == len(sigma) or sigma[want - 1] - sigma[want] > 1e-4 * sigma[0]:
        truncated = u[:, :want] * sigma[:want] @ vh[:want]
        torch.testing.assert_close(change(part), truncated, rtol=0, atol=3e-6 * float(sigma[0]))
        torch.testing.assert_close((part.A.double() ** 2).mean(), (a.double() ** 2).mean(), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings(ABOVE_FULL)
def test_a_min_rank_above_what_the_layer_can_have_leaves_tensors_of_the_rank_that_the_config_says() -> None:
    model, adapter, optimizer = energy_model(torch.randn(4, 9), torch.randn(9, 4), epsilon=0.5, min_rank=6)
    x = torch.randn(3, 4)
    before = model(x)
    adapter.step(optimizer, step=1)
    part = adapter.parts["0"]
    assert part.config.r == part.A.shape[0] == part.B.shape[1] >= 4
    if part.config.r > 4:
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "swapped"])
def test_where_nothing_is_learned_yet_the_rank_stays(init: str) -> None:
    adapter = tg.apply(nn.Sequential(nn.Linear(6, 5)), "adalora", ["@all"], rank=3, interval=1, init=init)
    before = [parameter.clone() for parameter in adapter.parameters()]
    adapter.step(torch.optim.SGD(adapter.parameters(), lr=0.1), step=1)
    assert all(torch.equal(old, new) for old, new in zip(before, adapter.parameters(), strict=True))


def test_decisions_come_every_interval_steps_only() -> None:
    _, adapter, optimizer = energy_model(torch.randn(8, 4) * torch.tensor([1, 1, 1e-4, 1e-4]), torch.randn(4, 7), interval=5)
    for step in range(1, 7):
        adapter.step(optimizer, step=step)
        assert adapter.parts["0"].config.r == len(adapter.parts["0"].A) == (4 if step < 5 else 2)
    assert adapter.state["history"] == [{"step": 5, "what": "shrink", "ranks": {"0": 2}}]


STALLS = [  # validation loss, what is decided, the rank then
    (1.0, "shrink", 3),  # nothing to compare with yet
    (0.9, "shrink", 3),
    (0.895, "grow", 5),  # better by less than 1 %
    (0.8, "shrink", 5),
    (0.9, "grow", 6),  # worse; and 6 is the most
    (0.79, "shrink", 6),
    (0.79, "grow", 6),
    (None, "shrink", 6),  # not measured
]


@pytest.mark.parametrize("name", ["val_loss", "validation_loss", "eval_loss"])
@torch.no_grad()
def test_while_the_validation_loss_stalls_directions_are_added_and_the_output_stays(name: str) -> None:
    torch.manual_seed(0)
    model, adapter, optimizer = energy_model(torch.randn(8, 3), torch.randn(3, 7), max_rank=6, growth=2, tolerance=0.01, epsilon=1e-6)
    part, x = adapter.parts["0"], torch.randn(4, 7)
    for step, (loss, what, rank) in enumerate(STALLS, 1):
        before, had = model(x), part.config.r
        adapter.step(optimizer, step=step, metrics={} if loss is None else {name: loss, "train_loss": 0.0})
        assert adapter.state["history"][-1] == {"step": step, "what": what, "ranks": {"0": rank}}
        assert len(part.A) == rank
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        assert part.config.scale == 16.0 / 3, "s stays that of the initial rank"
        part.B.data[:, had:] = torch.randn(8, rank - had)  # as if they had been trained


def test_losses_seen_between_two_decisions_count_and_the_best_of_all_is_what_must_be_beaten() -> None:
    _, adapter, optimizer = energy_model(torch.randn(8, 3), torch.randn(3, 7), epsilon=0, max_rank=99, growth=1, interval=2)
    for step, loss in enumerate([0.5, 1.0, 0.4, 0.9, 0.45, 0.41, 0.3, 2.0], 1):
        adapter.step(optimizer, step=step, metrics={"val_loss": loss})
    assert [entry["what"] for entry in adapter.state["history"]] == ["shrink", "shrink", "grow", "shrink"]


@pytest.mark.parametrize("options", [{}, {"min_rank": 3}, {"max_rank": 9, "min_rank": 4}, {"dtype": "bfloat16"}, {"init": "swapped"}])
def test_growth_adds_directions_at_zero_and_leaves_what_was_there(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 8), nn.Embedding(9, 8, padding_idx=2))
    adapter = tg.apply(model, "adalora", ["@all"], rank=4, interval=1, growth=1, **options)
    perturb_(adapter.parameters())
    adapter.parts["1"].A.data[:, 2] = 0
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    before = {name: parameter.clone() for name, parameter in adapter.named_parameters()}
    adapter.state["best"] = 1.0
    adapter.step(optimizer, step=1, metrics={"val_loss": 1.0})
    for name, part in adapter.parts.items():
        assert part.config.r == 5
        assert torch.equal(part.A[:4], before[f"{name}.A"])
        assert torch.equal(part.B, torch.cat([before[f"{name}.B"], torch.zeros(8, 1)], dim=1).to(part.B))
        assert part.A[4].any()
    assert not adapter.parts["1"].A[:, 2].any()


@pytest.mark.parametrize("first", [float("nan"), float("inf")])
def test_a_validation_loss_that_is_not_finite_does_not_end_growth_for_good(first: float) -> None:
    _, adapter, optimizer = energy_model(torch.randn(8, 3), torch.randn(3, 7), epsilon=0, max_rank=9, growth=1)
    for step, loss in enumerate([first, 1.0, 1.0], 1):
        adapter.step(optimizer, step=step, metrics={"val_loss": loss})
    assert adapter.state["history"][-1]["what"] == "grow"


def test_a_direction_that_is_dropped_and_a_graph_that_is_alive_do_not_disturb_the_next_backward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6))
    adapter = tg.apply(model, "adalora", ["@all"], rank=4, interval=3, epsilon=0.2, max_rank=5, growth=1)
    optimizer = adapter.optimizer("adamw", lr=0.03)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    objects = [id(parameter) for parameter in adapter.parameters()]
    x, alive, losses, ranks = torch.randn(16, 7), [], [], []
    for step in range(1, 61):
        loss = (model(x) - x[:, :6].cos()).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        adapter.step(optimizer, step=step, metrics={"val_loss": 1.0} if 30 < step < 40 else {})
        optimizer.zero_grad()
        alive.append(loss)
        losses.append(loss.item())
        ranks.append(adapter.parts["0"].config.r)
    assert len(set(ranks)) > 1
    assert losses[-1] < 0.5 * losses[0]
    assert [id(parameter) for parameter in adapter.parameters()] == objects
    assert [id(parameter) for group in optimizer.param_groups for parameter in group["params"]] == objects
    assert scheduler.get_last_lr() == pytest.approx([0.03 * 0.99**60])
    assert {"grow", "shrink"} == {entry["what"] for entry in adapter.state["history"]}
    del alive
    gc.collect()


# What the optimizer keeps for each entry, after a rebuild.


def two_layers(dtype: torch.dtype, spread: float = 1.0) -> tuple[nn.Sequential, tg.Adapter, Tensor]:
    """A model with adapters of rank 5 whose updates have rank 3 but for `spread`, not in the directions of A's rows."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6)).to(dtype)
    adapter = tg.apply(model, "adalora", ["@all"], rank=5, interval=1, epsilon=1e-6, dtype=str(dtype))
    for part in adapter.parts.values():
        b, a, mix = (
            torch.randn(part.site.out_features, 5).double(),
            torch.randn(5, part.site.in_features).double(),
            torch.randn(5, 5) + 4 * torch.eye(5),
        )
        part.B.data = (b * torch.tensor([1, 1, 1, spread, spread]) @ mix.double()).to(dtype)
        part.A.data = torch.linalg.solve(mix.double(), a).to(dtype)
    return model, adapter, torch.randn(16, 7).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_means_of_gradients_become_those_of_the_new_directions(name: str, dtype: torch.dtype) -> None:
    """Only null directions are dropped, so the loss is the same function and its new gradient can be computed."""
    if name == "bitsandbytes AdamW32bit" and dtype == torch.float64:
        pytest.skip("it has no float64")
    model, adapter, x = two_layers(dtype, 0.0)
    optimizer, before = OPTIMIZERS[name](adapter), model(x)
    before.square().sum().backward()
    optimizer.step()
    adapter.step(optimizer, step=1)
    optimizer.zero_grad()
    assert [part.config.r for part in adapter.parts.values()] == [3, 3]
    close = {"rtol": 0.0, "atol": 1e-4 if dtype == torch.float32 else 1e-10}
    torch.testing.assert_close(model(x) / before.abs().max(), before / before.abs().max(), **close)
    twin = deepcopy(model).double()
    twin(x.double()).square().sum().backward()
    checked = set()
    for parameter, exact in zip(adapter.parameters(), tg.adapters(twin)["default"].parameters(), strict=True):
        for key, value in optimizer.state[parameter].items():
            if key in MEANS and not (name == "RMSprop" and key == "momentum_buffer"):
                size = exact.grad.abs().max()
                torch.testing.assert_close(value.double() / size, MEANS[key] * exact.grad / size, **close)
                checked.add(key)
            if key in SQUARES | set(MEANS):
                assert value.shape == parameter.shape
            if key in SQUARES:
                assert (value >= 0).all()
                assert value.any()
    assert checked or name == "Adagrad"
