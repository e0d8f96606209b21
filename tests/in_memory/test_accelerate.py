"""Models on which accelerate has put hooks, as device_map="auto" does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import torchgraft as tg
from models import build, perturb_
from references import all_bits, assert_same_bits

X = torch.arange(8).reshape(2, 4)


class Counting(AlignDevicesHook):
    """Counts the forwards that it sees."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        Counting.calls += 1
        return super().pre_forward(module, *args, **kwargs)


def hooked(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, Counting("cpu", io_same_device=True))
    return model


def adapted(model: Any, method: str) -> tg.Adapter:
    adapter = tg.apply(model, method, ["q_proj", "v_proj"], rank=2)
    perturb_(adapter.parameters())
    return adapter


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_behind_hooks_computes_trains_and_merges_as_without(method: str) -> None:
    plain, model = build("llama").eval(), hooked(build("llama").eval())
    before = all_bits(model)
    expected, adapter = adapted(plain, method), adapted(model, method)
    Counting.calls = 0
    assert torch.equal(model(X).logits, plain(X).logits)
    assert Counting.calls > 4
    for each in (plain, model):
        each(X, labels=X).loss.backward()
    for one, other in zip(expected.parameters(), adapter.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    copied = copy.deepcopy(model)
    perturb_(tg.adapters(copied)["default"].parameters(), seed=5)
    assert not torch.equal(copied(X).logits, model(X).logits)
    expected.merge()
    adapter.merge()
    assert torch.equal(model(X).logits, plain(X).logits)
    adapter.detach()
    assert_same_bits(model, before)
    Counting.calls = 0
    assert torch.equal(model(X).logits, build("llama").eval()(X).logits)
    assert Counting.calls > 4


@pytest.mark.parametrize("hooks_first", [True, False])
def test_hooks_and_adapters_are_taken_off_in_any_order(hooks_first: bool) -> None:
    model = build("llama").eval()
    expected = model(X).logits
    if hooks_first:
        adapter = adapted(hooked(model), "lora")
    else:
        adapter = adapted(model, "lora")
        hooked(model)
    changed = model(X).logits
    assert not torch.equal(changed, expected)
    other = copy.deepcopy(model)
    adapter.detach()
    assert torch.equal(model(X).logits, expected)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(X).logits, expected)
    remove_hook_from_module(other, recurse=True)
    assert torch.equal(other(X).logits, changed)
    tg.adapters(other)["default"].detach()
    assert torch.equal(other(X).logits, expected)


def test_an_offloaded_weight_is_refused_with_a_way_out() -> None:
    model = build("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(tg.SelectionError, match="a weight that accelerate offloaded; attach the adapter before dispatch_model"):
        tg.apply(model, "lora", ["q_proj"])


def test_a_hooked_layer_is_not_replaced() -> None:
    with pytest.raises(tg.AttachError, match="accelerate has put a hook on it"):
        tg.apply(hooked(build("llama")), "qlora", ["q_proj"])
