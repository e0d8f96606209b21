"""Merging into a model in memory: what the weights are then, that unmerge gives every bit back, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import torchgraft as tg
from models import Plain, perturb_
from one_layer import (
    DTYPES,
    LAYERS,
    PLAIN_SITES,
    SCALE,
    TOKENS,
    adapted,
    as_stored,
    assert_near,
    input_of,
    own_dtype,
    plain,
    plain_model,
    reference,
)
from references import all_bits, assert_same_bits, bits, refused, state_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_merged_weight_is_the_dense_one_rounded_once(layer: str, dtype: str) -> None:
    module = plain(layer, dtype)
    model, adapter = adapted(module, dtype=own_dtype(dtype))
    part, x = adapter.parts["0"], input_of(module)
    unmerged = model(x).detach()
    adapter.merge()

    a, b, old = (tensor.detach().double() for tensor in (part.A, part.B, module.weight))
    want, found = old + as_stored(module, SCALE * b @ a), model[0].weight.detach().double()
    stored, wide = torch.finfo(DTYPES[dtype]), torch.finfo(DTYPES[own_dtype(dtype)])
    rounding = 0.5 * stored.eps * want.abs().clamp_min(stored.smallest_normal)
    arithmetic = 8 * wide.eps * (old.abs() + as_stored(module, SCALE * b.abs() @ a.abs()))
    assert ((found - want).abs() <= rounding + arithmetic).all()
    assert (found - old).abs().max() > 0.1
    output, size = reference(module, part, x)["output"]
    assert_near(model(x), (output, size), DTYPES[dtype])
    assert_near(model(x), (unmerged.double(), size), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_merging_and_unmerging_over_and_over_changes_no_bit(layer: str, dtype: str) -> None:
    model, adapter = adapted(plain(layer, dtype), dtype=own_dtype(dtype))
    weight = model[0].weight
    with torch.no_grad():
        weight.view(-1)[:4] = torch.tensor([-0.0, 0.0, torch.finfo(weight.dtype).tiny / 4, 300.0])
    before = bits(weight)
    for cycle in range(100 if dtype == "bfloat16" else 5):
        perturb_(adapter.parameters(), 0.1, seed=cycle)
        adapter.merge()
        changed, correction = bits(weight) != before, adapter.parts["0"].undo.correction
        adapter.unmerge()
        assert len(correction.step) < changed.sum(), "what arithmetic restores is not kept"
        assert torch.equal(bits(weight), before), f"cycle {cycle}"


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused() -> None:
    _, model, adapter = plain_model()
    before = all_bits(model)
    refused(adapter.unmerge, model, "'default' is not merged")
    adapter.merge()
    refused(adapter.merge, model, "'default' is merged already.*unmerge it first")
    assert adapter.merged
    adapter.unmerge()
    assert not adapter.merged
    refused(adapter.unmerge, model, "'default' is not merged")
    assert_same_bits(model, before)


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda parameter: parameter.detach().add_(1),
    "through data": lambda parameter: parameter.data.view(-1)[1:2].mul_(1.01),
    "only the sign of a zero": lambda parameter: parameter.data.view(-1)[0].neg_(),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("place", "name"), [("mlp.2", "B"), ("norm", "weight")])
def test_an_adapter_edited_while_merged_is_refused_or_set_back(place: str, name: str, edit: str) -> None:
    _, model, adapter = plain_model(also_train=["norm"])
    parameter = adapter.parts[place].B if place == "mlp.2" else adapter.copies[place].module.weight
    parameter.data.view(-1)[0] = 0.0
    before = all_bits(model)
    adapter.merge()
    EDITS[edit](parameter)
    refused(adapter.unmerge, model, f"{place}: the adapter's {name} changed while it was merged.*discard_edits=True")
    refused(adapter.detach, model, f"{place}: the adapter's {name} changed")
    assert adapter.merged
    adapter.unmerge(discard_edits=True)
    assert_same_bits(model, before)


@pytest.mark.parametrize("discard", [False, True])
@pytest.mark.parametrize("place", [*PLAIN_SITES, "norm"])
def test_a_merged_weight_that_was_edited_is_refused_and_every_part_stays_merged(place: str, discard: bool) -> None:
    _, model, adapter = plain_model(also_train=["norm"])
    before = all_bits(model)
    adapter.merge()
    weight = model.get_submodule(place).weight
    kept = weight.detach().clone()
    for entry in range(0, weight.numel(), 5):
        weight.data.view(-1)[entry] += 0.5
        refused(lambda: adapter.unmerge(discard_edits=discard), model, f"{place}: .*changed after")
        assert adapter.merged
        weight.data.copy_(kept)
    adapter.unmerge()
    assert_same_bits(model, before)


def two_adapters() -> tuple[nn.Module, tg.Adapter, tg.Adapter]:
    _, model, first = plain_model()
    second = tg.apply(model, "lora", targets=["head", "conv"], rank=2, name="second")
    perturb_(second.parameters())
    return model, first, second


def test_a_merged_adapter_cannot_be_switched() -> None:
    model, first, second = two_adapters()
    third = tg.apply(model, "lora", targets=["head"], rank=2, name="third")
    second.merge()
    before = model(TOKENS)
    for action in (lambda: setattr(second, "active", False), second.disabled().__enter__, lambda: tg.activate(model, "third")):
        refused(action, model, "'second' is merged into the weights and cannot be switched; unmerge it first")
        assert (first.active, second.active, third.active) == (True, True, True)
        assert torch.equal(model(TOKENS), before)


def test_of_two_merged_adapters_the_last_comes_off_first() -> None:
    model, first, second = two_adapters()
    before, output = all_bits(model), model(TOKENS)
    first.merge()
    between = all_bits(model)
    torch.testing.assert_close(model(TOKENS), output, atol=1e-4, rtol=0)
    second.merge()
    torch.testing.assert_close(model(TOKENS), output, atol=1e-4, rtol=0)
    refused(first.unmerge, model, r"(head|conv): another adapter was merged after 'default'; unmerge that one first")
    refused(first.detach, model, "another adapter was merged after 'default'")
    second.unmerge()
    assert_same_bits(model, between)
    first.unmerge()
    assert_same_bits(model, before)


def test_an_adapter_merged_over_one_that_was_kept_for_good_still_comes_off() -> None:
    model, first, second = two_adapters()
    first.merge()
    between = {name: bits(model.get_submodule(name).weight) for name in PLAIN_SITES}
    second.merge()
    first.detach(keep_merged=True)
    second.unmerge()
    for name, tensor in between.items():
        assert torch.equal(bits(model.get_submodule(name).weight), tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize(("site", "factor"), [(PLAIN_SITES[0], "A"), ("attn.out_proj", "B"), (PLAIN_SITES[-1], "A")])
def test_one_bad_adapter_tensor_leaves_every_weight_as_it_was(site: str, factor: str, value: float, dtype: str) -> None:
    _, model, adapter = plain_model(also_train=["norm"])
    model.to(DTYPES[dtype])
    good = getattr(adapter.parts[site], factor)
    kept = good.detach().clone()
    good.data[0, 0] = value
    refused(adapter.merge, model, f"{site}: .*adapter's {factor} has such entries.*Nothing was changed")
    assert not adapter.merged
    good.data.copy_(kept)
    before = all_bits(model)
    adapter.merge()
    adapter.unmerge()
    assert_same_bits(model, before)


def overflow(model: Plain, adapter: tg.Adapter) -> None:
    model.to(torch.float16)
    adapter.parts["mlp.2"].A.data.fill_(100.0)
    adapter.parts["mlp.2"].B.data.fill_(300.0)


def nan_beside_an_infinite_entry_of_the_base(model: Plain, adapter: tg.Adapter) -> None:
    model.mlp[2].weight.data[0, 0] = inf
    adapter.parts["mlp.2"].B.data[3, 0] = nan


def nan_in_a_module_trained_whole(model: Plain, adapter: tg.Adapter) -> None:
    adapter.copies["norm"].module.bias.data[1] = nan


def weight_that_torch_does_not_write(model: Plain, adapter: tg.Adapter) -> None:
    with torch.inference_mode():
        model.mlp[2].weight = nn.Parameter(torch.randn(8, 12), requires_grad=False)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (overflow, r"mlp\.2: .*leaves the range of torch\.float16"),
        (nan_beside_an_infinite_entry_of_the_base, r"mlp\.2: .*NaN"),
        (nan_in_a_module_trained_whole, "norm: .*NaN"),
        (weight_that_torch_does_not_write, r"mlp\.2|inference"),
    ],
)
def test_nothing_is_merged_if_one_part_cannot_be(spoil: Callable[[Plain, tg.Adapter], None], match: str) -> None:
    _, model, adapter = plain_model(also_train=["norm"])
    spoil(model, adapter)
    refused(adapter.merge, model, match, tg.MergeError, RuntimeError)
    assert not adapter.merged


def tied(how: str) -> Any:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(11, 6), "body": nn.Linear(6, 6), "head": nn.Linear(6, 11, bias=False)})
    memory = torch.randn(22, 6)
    model.embed.weight = nn.Parameter(memory[:11])
    if how == "the same Parameter":
        model.head.weight = model.embed.weight
    elif how == "the same memory, transposed":
        model.head = Conv1D(11, 6)
        model.head.weight = nn.Parameter(memory[:11].T)
    else:
        first = {"the same memory": 0, "overlapping memory": 1, "side by side": 11}[how]
        model.head.weight = nn.Parameter(memory[first : first + 11])
    return model


@pytest.mark.parametrize("how", ["the same Parameter", "the same memory", "the same memory, transposed", "overlapping memory"])
@pytest.mark.parametrize("targets", [["embed", "body"], ["body", "head"], ["@all"]])
def test_a_weight_that_another_layer_has_too_is_not_merged(how: str, targets: list[str]) -> None:
    model = tied(how)
    adapter = tg.apply(model, "lora", targets=targets, rank=2)
    perturb_(adapter.parameters())
    refused(adapter.merge, model, "(embed: its weight is shared with head|head: its weight is shared with embed), so")
    assert not adapter.merged


def test_weights_side_by_side_in_one_memory_are_not_tied() -> None:
    model = tied("side by side")
    adapter = tg.apply(model, "lora", targets=["embed"], rank=2)
    perturb_(adapter.parameters())
    before = {name: bits(model.get_submodule(name).weight) for name in ("embed", "head")}
    adapter.merge()
    assert not torch.equal(bits(model.embed.weight), before["embed"])
    assert torch.equal(bits(model.head.weight), before["head"])
    adapter.unmerge()
    assert torch.equal(bits(model.embed.weight), before["embed"])


def test_a_module_under_two_names_is_merged_once() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    adapter = tg.apply(model, "lora", targets=["@all"], rank=2, alpha=6)
    perturb_(adapter.parameters())
    (part,), before, x = adapter.parts.values(), layer.weight.detach().clone(), torch.randn(3, 6)
    output = model(x)
    adapter.merge()
    torch.testing.assert_close(layer.weight.double(), before.double() + 3.0 * part.B.double() @ part.A.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=0)
    adapter.unmerge()
    assert torch.equal(bits(layer.weight), bits(before))


def test_a_model_without_values_is_not_merged() -> None:
    with torch.device("meta"):
        model = Plain()
    adapter = tg.apply(model, "lora", targets=["@all"], rank=2)
    with pytest.raises(tg.MergeError, match="embed: its weight is on the meta device"):
        adapter.merge()
    assert not adapter.merged


@pytest.mark.parametrize("keep", [False, True])
def test_detaching_a_merged_adapter_takes_it_out_or_keeps_it(keep: bool) -> None:
    base, model, adapter = plain_model(also_train=["norm"])
    with pytest.raises(tg.MergeError, match="not merged, so there is nothing to keep"):
        adapter.detach(keep_merged=True)
    adapter.merge()
    merged, output = {name: bits(model.get_parameter(name)) for name in base.state_dict()}, model(TOKENS)
    adapter.detach(keep_merged=keep)
    assert list(model.state_dict()) == list(base.state_dict())
    assert_same_bits(model, merged if keep else all_bits(base))
    torch.testing.assert_close(model(TOKENS), output if keep else base(TOKENS), atol=1e-6, rtol=0)
    assert not torch.allclose(output, base(TOKENS), atol=0.05)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_what_is_saved_while_merged_loads_on_the_original_and_only_there(init: str, tmp_path: Path) -> None:
    base, model, adapter = plain_model(also_train=["norm"], init=init)
    output = model(TOKENS)
    adapter.merge()
    adapter.save(tmp_path)
    again = deepcopy(base)
    loaded = tg.load(again, tmp_path)
    torch.testing.assert_close(again(TOKENS), output, atol=1e-5, rtol=0)
    for name, tensor in loaded.named_parameters():
        assert torch.equal(tensor, dict(adapter.named_parameters())[name]), name
    adapter.detach(keep_merged=True)
    with pytest.raises(tg.PairingError, match="another model, or one that was merged into"):
        tg.load(model, tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(DTYPES)), st.integers(0, 2**32 - 1), st.floats(-8, 8))
@example("float64", 1_171_043_879, 0.0)  # has a signalling NaN
def test_whatever_the_weights_bits_merging_is_refused_or_undone(dtype: str, seed: int, magnitude: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(7, 5, dtype=DTYPES[dtype])
    size = layer.weight.element_size()
    noise = torch.randint(0, 256, (35 * size,), generator=generator, dtype=torch.uint8)
    noise[: seed % 3 * size] = 255  # NaN with a payload, in any dtype
    layer.weight.data = noise.view(DTYPES[dtype]).reshape(5, 7)
    model = nn.Sequential(layer)
    adapter = tg.apply(model, "lora", rank=2, dtype=own_dtype(dtype))
    perturb_(adapter.parameters(), 10.0**magnitude)
    before = bits(layer.weight)
    with suppress(tg.MergeError):  # a sum that leaves the dtype's range
        adapter.merge()
        assert adapter.merged
    if adapter.merged:
        adapter.unmerge()
    assert not adapter.merged
    assert torch.equal(bits(layer.weight), before)


def test_a_trained_head_that_leaves_the_range_of_float16_is_not_merged() -> None:
    model = Plain().half()
    adapter = tg.apply(model, "lora", "q_proj", also_train=["head"])
    adapter.copies["head"].module.float()
    with torch.no_grad():
        adapter.copies["head"].module.weight.fill_(1e5)
    before = state_of(model)
    with pytest.raises(tg.MergeError, match=r"head: .*float16"):
        adapter.merge()
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
