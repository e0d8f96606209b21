"""An adapter and a base that call the same layers differently: what is understood, what is refused, and that it is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
import torchgraft as tg
from architectures import assert_merges, inputs, logits
from renamed_adapters import TARGETS, build, forms, handmade, made, matrices, refused, save, written
from torchgraft.pairing.naming import Naming, described, own_names

Adapt = Callable[..., Any]


# Prefixes


@forms
@pytest.mark.parametrize("family", TARGETS)
def test_an_adapter_of_the_bare_model_fits_the_model_with_a_head(family: str, form: str, tmp_path: Path, adapt: Adapt) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "base")
    adapter = made(model.base_model, TARGETS[family], tmp_path / "adapter", form)
    assert_merges(model, tmp_path / "base", adapter, tmp_path)
    verdict = json.loads(adapt("check", tmp_path / "base", adapter, "--json").out)
    assert verdict["ok"]
    assert len(verdict["renamed"]) == len(tg.adapters(model.base_model)["default"].sites)
    again = build(family)
    tg.load(again, adapter)
    torch.testing.assert_close(logits(again), logits(model))


@forms
@pytest.mark.parametrize("family", TARGETS)
def test_an_adapter_of_the_model_with_a_head_fits_the_bare_model(family: str, form: str, tmp_path: Path) -> None:
    model = build(family)
    model.base_model.save_pretrained(tmp_path / "base")
    body = [f"{model.base_model_prefix}.*{target.lstrip('*')}" for target in TARGETS[family]]
    adapter = made(model, body, tmp_path / "adapter", form)
    tg.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    family_class: Any = type(model)
    merged = family_class.from_pretrained(tmp_path / "merged").eval()  # it makes a new head
    heads = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{model.base_model_prefix}.")}
    merged.load_state_dict(heads, strict=False)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    alone = build(family).base_model
    tg.load(alone, adapter)
    torch.testing.assert_close(first_output(alone, model), first_output(model.base_model, model))


@torch.no_grad()
def first_output(body: nn.Module, model: nn.Module) -> Tensor:
    return body(**inputs(model))[0]


def test_what_was_resolved_is_said(tmp_path: Path, adapt: Adapt) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    adapter = made(model.model, ["q_proj"], tmp_path / "adapter")
    says = f"note: the adapter's layers.* are model.layers.* here\n{adapter} fits {tmp_path / 'base'}\n"
    assert adapt("check", tmp_path / "base", adapter).out == says
    renamed = {f"layers.{block}.self_attn.q_proj": f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)}
    document = json.loads(adapt("check", tmp_path / "base", adapter, "--json").out)
    assert document == {"ok": True, "problems": [], "renamed": renamed, "notes": ["the adapter's layers.* are model.layers.* here"]}


@forms
def test_a_head_that_the_bare_model_lacks_is_named_and_nothing_else(form: str, tmp_path: Path, adapt: Adapt) -> None:
    model = build("bert")
    model.bert.save_pretrained(tmp_path / "base")
    adapter = made(model, ["query", "value"], tmp_path / "adapter", form, also_train=["classifier"])
    assert refused(tmp_path / "base", adapter, adapt) == ["classifier: the base has no such module; the adapter contains it"]
    out = adapt("check", tmp_path / "base", adapter).out
    assert out.startswith("note: the adapter's bert.encoder.* are encoder.* here\nproblem: classifier: ")


def test_a_head_beside_the_body_keeps_its_name(tmp_path: Path) -> None:
    """As in files that have the body without its prefix, and the head."""
    model = build("bert")
    state = {name.removeprefix("bert."): tensor for name, tensor in model.state_dict().items()}
    base = written(state, tmp_path / "base")
    adapter = made(model, ["query"], tmp_path / "adapter", also_train=["classifier"])
    tg.merge_checkpoint(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {name for name in state if not merged[name].equal(state[name])}
    assert changed == {"classifier.weight", "classifier.bias", *(f"encoder.layer.{n}.attention.self.query.weight" for n in (0, 1))}
    assert merged["classifier.weight"].equal(load_file(adapter / "adapter_model.safetensors")["base_model.model.classifier.weight"])


@forms
def test_a_module_that_is_trained_whole_inside_the_body_is_found(form: str, tmp_path: Path) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path / "base")
    adapter = made(model.bert, ["query"], tmp_path / "adapter", form, also_train=["pooler", "encoder.layer.1.output"])
    again = build("bert")
    loaded = tg.load(again, adapter)
    assert set(loaded.copies) == {"bert.pooler", "bert.encoder.layer.1.output"}
    torch.testing.assert_close(logits(again), logits(model))
    assert_merges(model, tmp_path / "base", adapter, tmp_path)


def test_warnings_about_the_weights_reach_a_renamed_site(tmp_path: Path) -> None:
    model = build("llama")
    tg.apply(model.model, "lora", ["q_proj"], name="beneath").save(tmp_path / "beneath")
    save(tg.apply(model.model, "dora", ["q_proj"], name="upper"), tmp_path / "upper")
    with pytest.warns(tg.TorchgraftWarning, match=r"model\.layers\.0\.self_attn\.q_proj and 1 more: it was trained over beneath"):
        tg.load(build("llama"), tmp_path / "upper")


def test_another_model_s_weights_are_refused_under_a_prefix_too(tmp_path: Path, adapt: Adapt) -> None:
    adapter = made(build("llama").model, ["q_proj"], tmp_path / "adapter")
    models.build("llama", seed=1).save_pretrained(tmp_path / "base")
    problems = refused(tmp_path / "base", adapter, adapt)
    assert [problem.partition(": the base's weight is not the one")[0] for problem in problems] == [
        f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)
    ]


def test_an_export_keeps_the_adapter_s_names(tmp_path: Path, adapt: Adapt) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path / "base")
    adapter = made(model.bert, ["query"], tmp_path / "adapter", "peft", also_train=["pooler"])
    assert adapt("export", adapter, "--to", "lora", "--base", tmp_path / "base", "-o", tmp_path / "plain").code == 0
    assert load_file(tmp_path / "plain" / "adapter_model.safetensors").keys() == load_file(adapter / "adapter_model.safetensors").keys()
    again = build("bert")
    tg.load(again.bert, tmp_path / "plain")
    torch.testing.assert_close(logits(again), logits(model))


# What must not be confused


def test_names_that_match_exactly_win(tmp_path: Path) -> None:
    base = written(matrices("layers.0.q_proj", "model.layers.0.q_proj"), tmp_path / "base")
    tg.merge_checkpoint(base, handmade(tmp_path / "adapter", "layers.0.q_proj"), tmp_path / "merged")
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    assert [name for name in before if not before[name].equal(after[name])] == ["layers.0.q_proj.weight"]


def test_names_of_which_some_match_exactly_are_read_in_one_way(tmp_path: Path, adapt: Adapt) -> None:
    base = written(matrices("layers.0.q_proj", "model.layers.0.q_proj", "model.layers.1.q_proj"), tmp_path / "base")
    adapter = handmade(tmp_path / "adapter", "layers.0.q_proj", "layers.1.q_proj")
    renamed = json.loads(adapt("check", base, adapter, "--json").out)["renamed"]
    assert renamed == {f"layers.{block}.q_proj": f"model.layers.{block}.q_proj" for block in (0, 1)}


def test_two_places_that_fit_are_refused_and_both_named(tmp_path: Path, adapt: Adapt) -> None:
    base = written(matrices("text.layers.0.q_proj", "vision.layers.0.q_proj"), tmp_path / "base")
    problems = refused(base, handmade(tmp_path / "adapter", "layers.0.q_proj"), adapt)
    assert len(problems) == 1
    assert "the adapter's layers.* are text.layers.* here; or the adapter's layers.* are vision.layers.* here" in problems[0]


def test_the_shape_tells_the_tower(tmp_path: Path) -> None:
    tensors = matrices("text.layers.0.q_proj", rows=8) | matrices("vision.layers.0.q_proj")
    adapter = handmade(tmp_path / "adapter", "layers.0.q_proj", rows=8)
    report = tg.merge_checkpoint(written(tensors, tmp_path / "base"), adapter, tmp_path / "merged")
    assert report.merged_tensors == 1
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged["vision.layers.0.q_proj.weight"].equal(tensors["vision.layers.0.q_proj.weight"])


@pytest.mark.parametrize(
    ("site", "layers"),
    {
        "one block of several": ("self_attn.q_proj", ["layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj"]),
        "a block that the base does not count": ("layers.1.q_proj", ["q_proj"]),
        "an expert for a block": ("layers.1.q_proj", ["layers.0.experts.1.q_proj", "experts.layers.0.q_proj"]),
        "another block": ("layers.2.q_proj", ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.12.q_proj"]),
        "the end of a segment": ("proj", ["q_proj", "layers.k_proj"]),
    }.values(),
)
def test_an_index_is_never_taken_off_or_put_on(site: str, layers: list[str], tmp_path: Path, adapt: Adapt) -> None:
    base = written(matrices(*layers), tmp_path / "base")
    assert refused(base, handmade(tmp_path / "adapter", site), adapt)[0].startswith(f"{site}: the base has no such layer")


# transformers' names


# Experts, in the two forms in which files hold them


@pytest.mark.parametrize("form", ["one tensor per expert", "fused"])
def test_the_attention_of_a_mixture_of_experts_is_adapted_in_both_forms(form: str, tmp_path: Path, adapt: Adapt) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "base")
    if form == "fused":
        tensors = model.state_dict()
        assert tensors["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
        save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adapter = made(model, ["@attention"], tmp_path / "adapter")
    assert_merges(model, tmp_path / "base", adapter, tmp_path)
    inspected = json.loads(adapt("inspect", tmp_path / "base", "--target", "@attention", "--json").out)
    assert inspected["matched"] == 8
    assert inspected["total_params"] == sum(parameter.numel() for parameter in build("mixtral").parameters())
    result = adapt("inspect", tmp_path / "base", "--target", "*experts*")
    assert result.code == 2
    assert "belongs to a mixture of experts" in result.err


def test_an_adapter_for_one_expert_is_refused_with_the_reason(tmp_path: Path, adapt: Adapt) -> None:
    build("mixtral").save_pretrained(tmp_path / "base")
    adapter = handmade(tmp_path / "adapter", "model.layers.0.block_sparse_moe.experts.1.w1")
    assert "belongs to a mixture of experts" in refused(tmp_path / "base", adapter, adapt)[0]


# Naming alone


def test_a_prefix_is_taken_off_or_put_on() -> None:
    bare, headed = (
        own_names(["layers.0.q.weight", "norm.weight"]),
        own_names(["model.layers.0.q.weight", "model.norm.weight", "head.weight"]),
    )
    (longer,) = bare.prefixed(["model.layers.0.q.lora_A.weight"])
    assert longer == Naming({"model.layers.0.q.weight": "layers.0.q.weight", "model.norm.weight": "norm.weight"})
    (shorter,) = headed.prefixed(["layers.0.q.lora_A.weight"])
    assert shorter == Naming({"layers.0.q.weight": "model.layers.0.q.weight", "norm.weight": "model.norm.weight"})
    (shorter,) = headed.prefixed(["layers.0.q.lora_A.weight", "head.lora_A.weight"])
    assert shorter.tensors["head.weight"] == "head.weight"
    assert not list(bare.prefixed(["layers.0.q.lora_A.weight", "other.lora_A.weight"]))


def test_a_whole_module_is_found_if_its_inside_has_the_same_names() -> None:
    naming = Naming({"b.x.weight": "a.b.x.weight", "b.y.z.weight": "a.b.y.z.weight", "c.new.weight": "c.old.weight"})
    assert [naming.module(name) for name in ("b", "b.y", "b.y.z", "c", "d")] == ["a.b", "a.b.y", "a.b.y.z", "", ""]


def test_a_module_whose_tensors_went_apart_is_where_its_weight_is() -> None:
    naming = Naming({"gate.weight": "mlp.gate.weight", "score": "mlp.gate.bias"})
    assert naming.modules == {"gate": "mlp.gate"}


def test_a_renaming_is_described_in_one_line() -> None:
    assert described({}) == ""
    assert described({"e.0.q": "m.e.0.q", "d.0.q": "m.d.0.q"}) == "the adapter's d.*, e.* are m.d.*, m.e.* here"
    assert described({"lm_head": "embed_out"}) == "the adapter's lm_head is embed_out here"
    assert described({"a.x": "b.x", "a.y": "b.y"}) == "the adapter's a.x is b.x here, and 1 more have other names"
