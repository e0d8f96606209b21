"""The cache of a site notices every step of an optimizer, also after the hook that counts steps was removed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from torchgraft.method.cache import Cache, StepCounter


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[StepCounter]:
    counter = StepCounter()
    monkeypatch.setattr(Cache, "steps", counter)
    yield counter
    counter.remove()


def value_of(cache: Cache, tensor: Tensor) -> float:
    with torch.no_grad():
        return float(cache.get("sum", [tensor], tensor.sum))


def unseen_step(parameter: nn.Parameter) -> None:
    """Step an optimizer, and write the parameter without raising torch's version count."""
    parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()
    parameter.data.add_(1)


def test_a_step_of_any_optimizer_makes_a_cached_value_stale(steps: StepCounter) -> None:
    cache, parameter = Cache(), nn.Parameter(torch.zeros(3))
    assert value_of(cache, parameter) == 0
    unseen_step(parameter)
    assert value_of(cache, parameter) == 3


def test_removing_the_hook_makes_cached_values_stale(steps: StepCounter) -> None:
    cache, parameter = Cache(), nn.Parameter(torch.zeros(3))
    assert value_of(cache, parameter) == 0
    steps.remove()
    unseen_step(parameter)
    assert value_of(cache, parameter) == 3
