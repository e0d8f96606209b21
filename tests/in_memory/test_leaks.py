"""Nothing of a model or an adapter stays behind after detach: no object, no hook, no entry in a cache."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import torchgraft as tg

METHODS = ["lora", "loraplus", "adalora", "dora"]


def cycle(model: nn.Module, method: str, *, backward: bool) -> None:
    adapter = tg.apply(model, method, ["0"], rank=2)
    if backward:
        model(torch.ones(2, 16)).sum().backward()
    adapter.detach()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_freed_after_its_adapter_was_detached(method: str, backward: bool) -> None:
    references = []
    for _ in range(5):
        model = nn.Sequential(nn.Linear(16, 16))
        cycle(model, method, backward=backward)
        references.append(weakref.ref(model))
        del model
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_cycles_of_apply_and_detach_leave_no_objects(method: str, backward: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    for _ in range(5):  # fill caches
        cycle(model, method, backward=backward)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(100):
        cycle(model, method, backward=backward)
    gc.collect()
    assert len(gc.get_objects()) - before < 100
