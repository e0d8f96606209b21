"""Models that were changed after adapters were attached, and models that cannot carry any: each is said, and nothing is half done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import torchgraft as tg
from models import perturb_
from references import all_bits, assert_same_bits

X = torch.randn(3, 4)


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def adapted() -> tuple[nn.Sequential, tg.Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    adapter = tg.apply(model, "lora", ["0", "1"], rank=2)
    perturb_(adapter.parameters())
    return model, adapter


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "former weight_norm": lambda layer: weight_norm(layer),
    "former spectral_norm": lambda layer: spectral_norm(layer),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_computed_since_is_not_merged_into(how: str) -> None:
    model, adapter = adapted()
    COMPUTED[how](model.eval()[0])  # in training, spectral_norm changes its buffers
    before = all_bits(model)
    with torch.no_grad():
        model(X)
    with pytest.raises(tg.MergeError, match=r"^0: its weight is computed since the adapter was attached"):
        adapter.merge()
    assert_same_bits(model, before)
    assert not adapter.merged


def test_a_parametrization_is_removed_before_the_adapter_is_detached() -> None:
    model, adapter = adapted()
    expected = model(X)
    parametrize.register_parametrization(model[0], "weight", Twice())
    with pytest.raises(tg.AttachError, match=r"^0: its class was changed after the adapter was attached, to ParametrizedGraftedLinear"):
        adapter.detach()
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert torch.equal(model(X), expected)
    adapter.merge()
    adapter.detach()
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_a_merged_model_is_not_loaded_into_one_that_is_not(strict: bool) -> None:
    model, adapter = adapted()
    other = copy.deepcopy(model)
    expected = model(X)
    unmerged = copy.deepcopy(model.state_dict())
    adapter.merge()
    state = copy.deepcopy(model.state_dict())
    if strict:
        with pytest.raises(RuntimeError, match=r"Unexpected key.*merged_into_the_weight"):
            other.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"Missing key.*merged_into_the_weight"):
            model.load_state_dict(unmerged)
    else:
        assert any("merged_into_the_weight" in key for key in other.load_state_dict(state, strict=False).unexpected_keys)
    model.load_state_dict(state)
    torch.testing.assert_close(model(X), expected)
    adapter.unmerge()
    assert model.state_dict().keys() == unmerged.keys()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(4)), r"^0\.weight has no shape yet"),
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))), "scripted or traced"),
        (lambda: torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager"), "the result of torch.compile; give the module itself"),
    ],
    ids=["lazy", "scripted", "compiled"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_model_that_cannot_carry_adapters_says_why(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(tg.SelectionError, match=says):
        tg.apply(make(), "lora", ["0"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_child_is_left_alone() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
    adapter = tg.apply(model, "lora", ["@linear"], rank=2)
    assert [site.name for site in adapter.sites] == ["1"]
    assert model(X).shape == (3, 4)
    adapter.detach()


@pytest.mark.parametrize("trainable", [True, False])
def test_a_parameter_that_was_replaced_while_attached_keeps_what_it_is(trainable: bool) -> None:
    model, adapter = adapted()
    model[0].weight = nn.Parameter(torch.ones(4, 4), requires_grad=trainable)
    model(X)
    adapter.detach()
    assert model[0].weight.requires_grad is trainable
    assert model[1].weight.requires_grad
