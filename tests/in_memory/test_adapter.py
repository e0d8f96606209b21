"""Adapters on a model: what attaching leaves alone, switching, copying, training whole modules, taking off."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from lora_model import RANK, TOKENS, dense, output, plain, put
from models import Plain, build, perturb_
from references import assert_same_state, state_of
from torchgraft.in_memory.record import STATE

SHAPES = {
    "embed": (6, 11),
    "conv": (8, 18),
    "attn.q_proj": (8, 8),
    "attn.out_proj": (8, 8),
    "mlp.0": (12, 8),
    "mlp.2": (8, 12),
    "head": (5, 8),
}


def logits(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return model(input_ids=TOKENS, **more).logits.detach()


@pytest.mark.parametrize("family", ["plain", "llama", "t5"])
def test_attaching_keeps_objects_names_classes_and_state(family: str) -> None:
    model, run = (plain(), output) if family == "plain" else (build(family).double(), logits)
    modules, classes, before, base = dict(model.named_modules()), {m: type(m) for m in model.modules()}, state_of(model), deepcopy(model)
    adapter = put(model, "extra", "@linear")
    after = dict(model.named_modules())
    assert all(after[name] is module and isinstance(module, classes[module]) for name, module in modules.items())
    assert list(after) != list(modules)
    state = model.state_dict()
    assert_same_state(before, {key: state[key] for key in before})
    assert set(state) - set(before) == {f"{site.name}.adapters.extra.{key}" for site in adapter.sites for key in "AB"}
    torch.testing.assert_close(run(model), run(dense(base, adapter)))
    assert (run(model) - run(base)).abs().max() > 1e-2
    adapter.detach()
    assert {m: type(m) for m in model.modules()} == classes
    assert list(model.named_modules()) == list(modules.items())
    assert_same_state(before, model.state_dict())
    assert STATE not in vars(model)
    assert [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks] == []
    assert tg.adapters(model) == {}


def _torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [deepcopy, _pickled, _torch_saved])
def test_a_copy_has_its_own_adapters(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = plain()
    base = deepcopy(model)
    adapter = put(model, also_train=["head"], targets=["embed", "conv", "@mlp"])
    expected = output(model)
    copy = duplicate(model)
    own = tg.adapters(copy)["default"]
    assert own.model is copy
    assert own is not adapter
    assert all(site.module is copy.get_submodule(site.name) for site in own.sites)
    assert {id(p) for p in own.parameters()} <= {id(p) for p in copy.parameters()}
    torch.testing.assert_close(output(copy), expected)
    optimizer = torch.optim.SGD(own.param_groups(lr=0.5))
    copy(TOKENS).square().mean().backward()
    optimizer.step()
    assert torch.equal(output(model), expected)
    assert (output(copy) - expected).abs().max() > 1e-3
    torch.testing.assert_close(output(copy), output(dense(base, own)))
    own.merge()
    torch.testing.assert_close(output(copy), output(dense(base, own)))
    own.detach()
    assert_same_state(copy.state_dict(), base.state_dict())
    assert torch.equal(output(model), expected)


def test_a_merged_adapter_survives_a_copy() -> None:
    model = plain()
    base = deepcopy(model)
    put(model).merge()
    copy = _pickled(model)
    tg.adapters(copy)["default"].detach()
    assert_same_state(copy.state_dict(), base.state_dict())


def test_state_dict_goes_through_a_file(tmp_path: Path) -> None:
    model, other = plain(), plain(seed=5)
    put(model, also_train=["head"], targets=["embed", "@mlp"])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    put(other, also_train=["head"], targets=["embed", "@mlp"], seed=9)
    assert (output(other) - output(model)).abs().max() > 1e-2
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(output(other), output(model), rtol=0, atol=0)


@pytest.mark.parametrize("make", [Plain, lambda: build("llama")])
def test_meta_models_are_attached_and_counted_without_values(make: Callable[[], nn.Module]) -> None:
    real = make()
    with torch.device("meta"):
        model = make()
    counts = [tg.apply(m, "lora", "@linear", rank=RANK).count() for m in (real, model)]
    assert counts[0] == counts[1]
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_dtype_converts_the_adapter_too(dtype: torch.dtype) -> None:
    model = plain().float()
    base = deepcopy(model)
    adapter = put(model, dtype="float32")
    expected = output(dense(base, adapter))
    model.to(dtype)
    assert {p.dtype for p in adapter.parameters()} == {dtype}
    assert output(model).dtype == dtype
    tolerance = 1e-6 if dtype == torch.float64 else 0.2
    torch.testing.assert_close(output(model).double(), expected, rtol=tolerance, atol=tolerance)
    adapter.merge()
    torch.testing.assert_close(output(model).double(), expected, rtol=tolerance, atol=tolerance)


def test_several_adapters_add_up_and_any_set_can_be_active() -> None:
    model = plain()
    base = deepcopy(model)
    found = {name: put(model, name, targets, seed=seed, rank=rank) for name, targets, seed, rank in TRIO}
    assert list(tg.adapters(model)) == ["one", "two", "three"]
    for names in ([], ["two"], ["one", "three"], ["three", "two", "one"]):
        tg.activate(model, *names)
        assert {name for name, adapter in found.items() if adapter.active} == set(names)
        torch.testing.assert_close(output(model), output(dense(base, *(found[name] for name in names))))
    with pytest.raises(tg.AttachError, match=r"'tow'.*near names: two.*it has one, two, three"):
        tg.activate(model, "one", "tow")
    assert all(adapter.active for adapter in found.values())
    found["two"].detach()
    torch.testing.assert_close(output(model), output(dense(base, found["one"], found["three"])))
    with pytest.raises(tg.AttachError, match="has an adapter 'one'"):
        put(model, "one")
    found["one"].merge()
    with pytest.raises(tg.MergeError, match="unmerge it first"):
        tg.activate(model, "three")
    assert found["three"].active


TRIO = [("one", ["@all"], 1, 3), ("two", ["q_proj", "embed"], 2, 2), ("three", ["conv", "q_proj"], 3, 1)]


@pytest.mark.parametrize("before", [True, False])
def test_disabled_restores_the_previous_state(before: bool) -> None:
    model = plain()
    base = output(model.requires_grad_(False))  # torch's linear rounds otherwise where its bias is trained
    adapter, other = put(model, "a"), put(model, "b", seed=2)
    other.active, adapter.active = False, before
    with adapter.disabled(), adapter.disabled():
        torch.testing.assert_close(output(model), base, rtol=0, atol=0)
    assert (adapter.active, other.active) == (before, False)
    with pytest.raises(ZeroDivisionError), adapter.disabled():
        _ = 1 / 0
    assert (adapter.active, other.active) == (before, False)
    assert bool((output(model) - base).abs().max() > 1e-2) == before


def test_the_base_is_frozen_until_the_last_adapter_is_off() -> None:
    model = plain()
    model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    one, two = put(model, "one"), put(model, "two")
    own = {id(p) for adapter in (one, two) for p in adapter.parameters()}
    assert all(p.requires_grad == (id(p) in own) for p in model.parameters())
    one.detach()
    assert [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own] == []
    two.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_layer_of_the_base_stays_in_training_mode() -> None:
    model = plain().train()
    put(model, dropout=0.5)
    assert all(module.training for module in model.modules())
    assert not torch.equal(output(model), output(model))
    model.eval()
    assert torch.equal(output(model), output(model))


def test_a_trained_head_runs_in_place_of_the_base(tmp_path: Path) -> None:
    model = plain()
    base = deepcopy(model).requires_grad_(False)
    adapter = put(model, targets=["q_proj"], also_train=["head"])
    expected = output(dense(base, adapter))
    own = adapter.copies["head"].module.weight
    assert (own - base.head.weight).abs().max() > 0.1
    assert torch.equal(model.head.weight, base.head.weight)
    torch.testing.assert_close(output(model), expected)
    with adapter.disabled():
        assert torch.equal(output(model), output(base))
    adapter.save(tmp_path / "saved")
    other = deepcopy(base)
    tg.load(other, tmp_path / "saved")
    torch.testing.assert_close(output(other), expected)
    adapter.merge()
    assert torch.equal(model.head.weight, own)
    torch.testing.assert_close(output(model), expected)
    adapter.unmerge()
    torch.testing.assert_close(output(model), expected)
    adapter.detach()
    assert_same_state(model.state_dict(), base.state_dict())


def test_each_adapter_trains_its_own_head() -> None:
    model = plain()
    base = deepcopy(model)
    one = put(model, "one", ["q_proj"], also_train=["head"])
    two = put(model, "two", ["q_proj"], also_train=["head"], seed=2)
    assert type(two.copies["head"].module) is nn.Linear
    for name, adapter in (("one", one), ("two", two)):
        tg.activate(model, name)
        torch.testing.assert_close(output(model), output(dense(base, adapter)))
    assert torch.equal(model.head.weight, base.head.weight)


def test_also_train_takes_a_sequential_and_its_layers_are_no_sites() -> None:
    model = plain()
    base = deepcopy(model)
    adapter = put(model, targets=["@linear"], also_train=["mlp"])
    assert {site.name for site in adapter.sites} == {"attn.q_proj", "attn.out_proj"}
    trained = sum(p.numel() for p in base.mlp.parameters())
    assert adapter.count().trainable == trained + 2 * RANK * (8 + 8)
    torch.testing.assert_close(output(model), output(dense(base, adapter)))
    adapter.merge()
    torch.testing.assert_close(output(model), output(dense(base, adapter)))
    adapter.detach()
    assert_same_state(model.state_dict(), base.state_dict())


def test_count_is_trainable_and_total() -> None:
    model = plain()
    base = sum(p.numel() for p in model.parameters())
    trained = RANK * sum(out + width for out, width in SHAPES.values())
    count = put(model).count()
    assert (count.trainable, count.total) == (trained, base + trained)
    assert count.percent == pytest.approx(100 * trained / (base + trained))


def test_seeds_fix_each_site_whatever_else_is_selected() -> None:
    def tensors(targets: Any, seed: int) -> dict[str, Tensor]:
        return dict(tg.apply(plain(), "lora", targets, seed=seed, rank=RANK).named_parameters())

    everything, some, other = tensors("@all", 4), tensors("q_proj", 4), tensors("@all", 5)
    assert torch.equal(some["attn.q_proj.A"], everything["attn.q_proj.A"])
    assert not torch.equal(everything["attn.q_proj.A"], other["attn.q_proj.A"])
    assert not torch.equal(everything["attn.q_proj.A"], everything["attn.out_proj.A"])


@pytest.mark.parametrize("act", ["merge", "unmerge", "detach"])
def test_a_detached_adapter_changes_nothing(act: str) -> None:
    model = Plain()
    adapter = tg.apply(model, "lora", "@linear")
    perturb_(adapter.parameters())
    adapter.detach()
    before = state_of(model)
    with pytest.raises(tg.AttachError, match="was detached"):
        getattr(adapter, act)()
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_merging_while_disabled_does_not_break_the_block() -> None:
    model = Plain()
    adapter = tg.apply(model, "lora", "@linear")
    with adapter.disabled():
        adapter.merge()
    assert adapter.merged
    adapter.unmerge()
    assert adapter.active
