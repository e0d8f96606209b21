"""Test what happens to models with quantized layers: refusals, copies, state dicts and plans."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import bitsandbytes as bnb
import pytest
from torch import nn

import torchgraft as tg
from models import perturb_
from quantized_layers import LAYERS, adapted, assert_same, eight_bit, four_bit, inputs, stored

NOT_YET = {
    "4 bit": (lambda: bnb.nn.Linear4bit(64, 64), r"0 is not quantized yet.*\.to\("),
    "8 bit": (lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), r"0 is not quantized yet.*\.to\("),
    "8 bit, trained": (lambda: bnb.nn.Linear8bitLt(64, 64), r"0 quantizes in each forward .*has_fp16_weights=True"),
}


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
@pytest.mark.parametrize(("layer", "reason"), NOT_YET.values(), ids=NOT_YET)
def test_a_layer_that_is_not_quantized_yet_is_refused(layer: Callable[[], nn.Module], reason: str, method: str) -> None:
    model = nn.Sequential(layer())
    with pytest.raises(tg.SelectionError, match=reason):
        tg.apply(model, method, ["0"])
    assert tg.adapters(model) == {}


@pytest.mark.parametrize("layer", [four_bit, eight_bit])
def test_a_quantized_layer_cannot_be_trained_whole(layer: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(layer(), nn.Linear(64, 4))
    with pytest.raises(tg.TorchgraftError, match=r"^0: "):
        tg.apply(model, "lora", ["1"], rank=2, also_train=["0"])
    assert tg.adapters(model) == {}
    assert type(model[0]) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def by_copy(model: nn.Module) -> nn.Module:
    return deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
@pytest.mark.parametrize("again", [by_copy, by_pickle])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("method", ["lora", "dora", "adalora, budget"])
def test_a_copy_is_whole_and_its_own(method: str, layer: Callable[[], nn.Module], again: Callable[..., Any], merged: bool) -> None:
    model, adapter = adapted(layer().train(), method)
    x, cls = inputs(model[0]), type(model[0])
    before, unmerged = stored(model[0]), model(x)
    if merged:
        adapter.merge()
    want = model(x)
    copy = again(model)
    assert copy(x).equal(want)
    own = tg.adapters(copy)["default"]
    if merged:
        own.unmerge()
    assert isinstance(copy[0], cls)
    assert copy(x).equal(unmerged)
    perturb_(own.parameters())
    own.merge()
    assert model(x).equal(want)
    own.detach()
    assert_same(stored(copy[0])[1:], before[1:])
    assert type(copy[0]) is cls.__mro__[2]
    assert model(x).equal(want)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_base_s_part_of_state_dict_is_as_it_was(layer: Callable[[], nn.Module]) -> None:
    module = layer().train()
    before = {key: tensor.clone() for key, tensor in nn.Sequential(module).state_dict().items()}
    model, adapter = adapted(module)
    assert {key for key in model.state_dict() if key not in before} == {"0.adapters.default.A", "0.adapters.default.B"}
    for _ in range(2):
        assert all(model.state_dict()[key].equal(tensor) for key, tensor in before.items())
        adapter.merge()
        adapter.unmerge()
    adapter.detach()
    assert list(model.state_dict()) == list(before)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if name.endswith("weight"))


def test_a_plan_counts_weights_and_not_bytes() -> None:
    model = nn.ModuleDict(
        {"self_attn": nn.ModuleDict({"q_proj": four_bit((64, 256))}), "down": eight_bit((6, 10)), "odd": four_bit((3, 5))}
    )
    plan = tg.plan(model)
    found = {layer.name: (layer.kind, layer.shape, layer.params, layer.role) for layer in plan.sites}
    assert found == {
        "self_attn.q_proj": ("Linear4bit", (64, 256), 64 * 256 + 64, "attention"),
        "down": ("Linear8bitLt", (6, 10), 6 * 10 + 6, "linear"),
        "odd": ("Linear4bit", (3, 5), 3 * 5 + 3, "linear"),
    }
    assert {layer.name: layer.bytes for layer in plan.sites} == {
        "self_attn.q_proj": 64 * 256 // 2 + 4 * 64,
        "down": 60 + 4 * 6,
        "odd": 8 + 4 * 3,
    }
    assert [layer.name for layer in tg.plan(model, "@attention").sites] == ["self_attn.q_proj"]
