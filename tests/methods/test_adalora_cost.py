"""What makes AdaLoRA's decisions cheap, as far as it shows without a clock: which of torch's operations run, and on what."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchgraft as tg
from models import Plain, perturb_

TOKENS = torch.arange(44).reshape(4, 11) * 7 % 11
BUDGET: dict[str, Any] = {"allocator": "budget", "rank": 4, "target_rank": 2, "total_steps": 100, "warmup_steps": 0, "interval": 10}
TO_HOST = "_local_scalar_dense"
"""The operation beneath bool(tensor), tensor.item() and int(tensor): the host waits for the device."""


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        """Name of the operation, and the shape of the first tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
        self.calls.append((function.overloadpacket.__name__, shape))
        return function(*args, **(kwargs or {}))

    def count(self) -> Counter[str]:
        return Counter(name for name, _ in self.calls)

    def shapes(self, part_of_name: str) -> set[tuple[int, ...]]:
        return {shape for name, shape in self.calls if part_of_name in name}


def made(**options: Any) -> tuple[nn.Module, tg.Adapter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Plain().eval()
    adapter = tg.apply(model, "adalora", ["@all"], **options)
    perturb_(adapter.parameters())
    return model, adapter, adapter.optimizer("adamw", lr=0.02)


def train(model: nn.Module, adapter: tg.Adapter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        (model(TOKENS) - TOKENS[..., None] / 5).square().mean().backward()
        optimizer.step()
        adapter.step(optimizer, step=step)


@pytest.mark.parametrize("before", [1, 35], ids=["at the initial rank", "with parked triplets"])
def test_a_step_without_a_decision_waits_once_for_the_device_and_goes_over_all_tensors_at_once(before: int) -> None:
    model, adapter, optimizer = made(**BUDGET)
    train(model, adapter, optimizer, range(1, before + 1))
    assert any(not adapter.state[f"{name}.kept"].all() for name in adapter.parts) == (before > 10)
    with Recorder() as recorder:
        adapter.step(optimizer, step=before + 1)
    count = recorder.count()
    assert count[TO_HOST] == 1
    assert not {"nonzero", "index", "index_put_"} & count.keys(), "masks wait for the device, too"
    assert {name: n for name, n in count.items() if name.startswith("_foreach")} == {
        "_foreach_mul": 1, "_foreach_abs_": 2, "_foreach_lerp_": 2, "_foreach_sub_": 1,
    }  # fmt: skip


def test_a_decision_looks_at_all_scores_at_once() -> None:
    counts = []
    for blocks in (1, 6):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(blocks)))
        adapter = tg.apply(model, "adalora", ["@all"], **BUDGET)
        perturb_(adapter.parameters())
        model(torch.randn(5, 8)).square().mean().backward()
        with Recorder() as recorder:
            adapter.step(torch.optim.SGD(adapter.parameters(), lr=0.0), step=90)
        assert sum(part.config.r for part in adapter.parts.values()) == 2 * blocks
        counts.append(recorder.count()["argsort"] + recorder.count()["sort"])
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("before", [3, 35], ids=["at the initial rank", "with parked triplets"])
def test_a_state_laid_out_as_a_file_has_it_gives_the_same_bits(before: int) -> None:
    runs = []
    for stored in (False, True):
        model, adapter, optimizer = made(**BUDGET)
        train(model, adapter, optimizer, range(1, before + 1))
        if stored:
            adapter.state.update({key: value.contiguous().clone() for key, value in adapter.state.items() if isinstance(value, Tensor)})
        train(model, adapter, optimizer, range(before + 1, 75))
        runs.append((adapter.state, dict(adapter.named_parameters())))
    (one, parameters), (other, others) = runs
    assert one.keys() == other.keys()
    assert one["history"] == other["history"]
    tensors = [key for key, value in one.items() if isinstance(value, Tensor)]
    assert any(key.endswith("B.parked") for key in tensors)
    assert all(torch.equal(one[key], other[key]) for key in tensors)
    assert all(torch.equal(parameters[key], others[key]) for key in parameters)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [False, True])
def test_a_gradient_that_is_not_finite_leaves_the_averages_as_they_were(first: bool, value: float) -> None:
    model, adapter, optimizer = made(**BUDGET)
    if not first:
        train(model, adapter, optimizer, range(1, 4))
    before = {key: tensor.clone() for key, tensor in adapter.state.items() if isinstance(tensor, Tensor)}
    optimizer.zero_grad()
    model(TOKENS).square().mean().backward()
    part = adapter.parts["head"]
    part.E.data[1] = 0  # 0 · ∞ is not finite either
    part.E.grad[1] = value
    adapter.step(optimizer, step=4)
    found = {key: tensor for key, tensor in adapter.state.items() if isinstance(tensor, Tensor)}
    assert len(found) == 7 * len(adapter.parts)
    for key, tensor in found.items():
        start = torch.ones_like(tensor) if key.endswith("kept") else torch.zeros_like(tensor)
        assert torch.equal(tensor, before.get(key, start)), key


def test_a_decision_at_a_first_step_that_was_skipped_keeps_to_the_budget() -> None:
    model, adapter, optimizer = made(**{**BUDGET, "interval": 1})
    model(TOKENS).square().mean().backward()
    adapter.parts["head"].E.grad.fill_(float("inf"))
    adapter.step(optimizer, step=50)
    ranks = [part.config.r for part in adapter.parts.values()]
    assert 2 * len(ranks) < sum(ranks) < 4 * len(ranks)


def test_energy_decomposes_the_factors_and_an_r_by_r_core_and_never_their_product() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 50))
    adapter = tg.apply(model, "adalora", ["@all"], rank=4, interval=1, epsilon=0.2)
    perturb_(adapter.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with Recorder() as recorder:
        adapter.step(optimizer, step=1)
    assert any(part.config.r < 4 for part in adapter.parts.values())
    assert recorder.shapes("svd") | recorder.shapes("pinv") == {(4, 4)}
    assert recorder.shapes("qr") == {(30, 4), (40, 4), (50, 4)}
    assert all(4 in shape or len(shape) < 2 or min(shape) < 4 for _, shape in recorder.calls), "no B·A"
