"""Modules that are fully trained beside the layers of an adapter: which can be, and whose copy is trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import torchgraft as tg
from models import Plain, perturb_


@pytest.mark.parametrize("whole_first", [True, False])
def test_one_module_is_not_both_adapted_and_trained_whole(whole_first: bool) -> None:
    model = Plain()
    ways = [{"targets": "q_proj", "also_train": "head"}, {"targets": "head"}]
    tg.apply(model, "lora", rank=2, name="one", **ways[0 if whole_first else 1])
    with pytest.raises(tg.AttachError, match=r"head: .*'one'"):
        tg.apply(model, "lora", rank=2, name="two", **ways[1 if whole_first else 0])
    assert list(tg.adapters(model)) == ["one"]


def test_a_module_whose_forward_nothing_calls_is_not_trained_whole() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    with pytest.raises(tg.AttachError, match="is bypassed: a MultiheadAttention reads its weight"):
        tg.apply(model, "lora", "fc", rank=2, also_train=["out_proj"])
    fc = nn.Linear(4, 4)
    fc.forward = lambda x: x
    with pytest.raises(tg.AttachError, match="replaced on the instance"):
        tg.apply(nn.ModuleDict({"a": nn.Linear(4, 4), "fc": fc}), "lora", "a", rank=2, also_train=["fc"])


def test_a_module_with_two_names_is_trained_once() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    adapter = tg.apply(model, "lora", "fc", rank=2, also_train=["a", "b"])
    assert adapter.count().trainable == 2 * (4 + 4) + 20
    adapter.detach()
    assert type(model["a"]) is nn.Linear


def test_a_container_with_a_parameter_of_its_own_is_trained_whole(tmp_path: Path) -> None:
    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4))
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), Scaled())

    model = build()
    adapter = tg.apply(model, "lora", "0", rank=2, also_train=["1"])
    perturb_(adapter.parameters())
    x = torch.randn(3, 4)
    adapter.save(tmp_path / "adapter")
    other = build()
    tg.load(other, tmp_path / "adapter")
    torch.testing.assert_close(other(x), model(x))
    assert not torch.allclose(build()(x), model(x))


def test_a_copy_of_the_model_trains_its_own_head() -> None:
    model = Plain()
    tg.apply(model, "lora", "q_proj", also_train=["head"])
    other = copy.deepcopy(model)
    copied = tg.adapters(other)["default"].copies["head"]
    assert copied.original is other.head
    assert copied.module is not tg.adapters(model)["default"].copies["head"].module
