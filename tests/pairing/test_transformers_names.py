"""Layers that transformers names in memory other than in its files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping

import models
import torchgraft as tg
from architectures import assert_merges, logits
from command import Adapt
from renamed_adapters import build, made, refused
from saved_adapters import rename, snapshot
from torchgraft.pairing import transformers_names


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    build("llava").save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def test_an_adapter_of_the_language_model_does_not_reach_the_vision_tower(llava: Path, tmp_path: Path, adapt: Adapt) -> None:
    model = build("llava").model.language_model
    mlp = made(model, ["gate_proj"], tmp_path / "mlp")
    renamed = json.loads(adapt("check", llava, mlp, "--json").out)["renamed"]
    assert renamed == {f"layers.{n}.mlp.gate_proj": f"language_model.model.layers.{n}.mlp.gate_proj" for n in (0, 1)}
    both = made(model, ["q_proj"], tmp_path / "both", name="both")  # q_proj is 32 x 32 in each tower, and in each block
    problems = refused(llava, both, adapt)
    assert re.search("language_model.model.layers.* here; or .* vision_tower.*layers", problems[0])


def test_a_selection_counts_both_towers_and_a_glob_tells_them_apart(llava: Path) -> None:
    assert tg.plan(llava, ["q_proj"]).patterns == {"q_proj": 4}
    sites = tg.plan(llava, ["@attention", "!vision_tower.*"], layers="1").sites
    assert {site.name for site in sites} == {f"language_model.model.layers.1.self_attn.{letter}_proj" for letter in "qkvo"}


def test_transformers_tells_the_names_in_memory(tmp_path: Path) -> None:
    for family in ("vit", "gpt_neox", "llava"):
        model = build(family)
        model.save_pretrained(tmp_path / family)
        files, memory = load_file(tmp_path / family / "model.safetensors"), model.state_dict()
        naming = next(iter(transformers_names.of_checkpoint(json.loads((tmp_path / family / "config.json").read_text()), files)))
        assert naming.tensors.keys() == memory.keys()
        assert all(memory[name].equal(files[own]) for name, own in naming.tensors.items())
        back = transformers_names.of_module(model, memory)[0]
        assert {own: name for name, own in back.tensors.items()} == naming.tensors
    assert list(transformers_names.of_checkpoint({}, ["a.weight"])) == []
    assert transformers_names.of_module(models.Plain(), ["embed.weight"]) == []


def test_a_fused_tensor_has_no_other_name(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "mixtral")
    config = json.loads((tmp_path / "mixtral" / "config.json").read_text())
    naming, *_ = transformers_names.of_checkpoint(config, load_file(tmp_path / "mixtral" / "model.safetensors"))
    assert naming.modules["model.layers.1.mlp.gate"] == "model.layers.1.block_sparse_moe.gate"
    assert not any("experts" in name for name in naming.tensors)


@pytest.fixture
def vit(tmp_path: Path) -> tuple[Path, Path]:
    """Files, and an adapter under names in memory."""
    model = build("vit")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base", made(model, ["q_proj"], tmp_path / "adapter")


def test_both_are_named_where_transformers_renames(vit: tuple[Path, Path], adapt: Adapt) -> None:
    says = "note: the adapter's vit.layers.0.attention.q_proj is vit.encoder.layer.0.attention.attention.query here, and 1 more"
    assert adapt("check", *vit).out.startswith(says)


def test_a_head_over_renamed_layers_is_a_prefix_too(tmp_path: Path) -> None:
    model = build("vit")
    model.save_pretrained(tmp_path / "base")
    assert_merges(model, tmp_path / "base", made(model.vit, ["q_proj", "fc2"], tmp_path / "adapter"), tmp_path)


def test_an_adapter_from_before_the_renaming_is_loaded(tmp_path: Path) -> None:
    """PEFT's adapters that were trained with transformers 4 have its names, which the files still have."""
    model = build("vit")
    adapter = made(model, ["q_proj", "fc1"], tmp_path / "adapter", "peft")
    for new, old in {
        "vit.layers": "vit.encoder.layer",
        "attention.q_proj": "attention.attention.query",
        "mlp.fc1": "intermediate.dense",
    }.items():
        rename(adapter, new, old)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"q_proj"', '"query"').replace('"fc1"', '"intermediate.dense"'))
    again = build("vit")
    tg.load(again, adapter)
    torch.testing.assert_close(logits(again), logits(model))
    tg.load(build("vit").vit, adapter)


def test_a_whole_module_whose_inside_is_renamed_is_merged_but_not_replaced_in_memory(tmp_path: Path, adapt: Adapt) -> None:
    model = build("vit")
    model.save_pretrained(tmp_path / "base")
    adapter = made(model, ["vit.layers.0.*.q_proj"], tmp_path / "adapter", also_train=["vit.layers.1"])
    assert_merges(model, tmp_path / "base", adapter, tmp_path)
    on_files = tmp_path / "on files"
    options = ["--plugin", "lora", "--target", "*.0.*.query", "--also-train", "vit.encoder.layer.1"]
    assert adapt("apply", tmp_path / "base", *options, "-o", on_files).code == 0
    with pytest.raises(tg.PairingError, match=r"vit\.encoder\.layer\.1: the adapter contains the whole module, .* cannot be replaced"):
        tg.load(build("vit"), on_files)


def test_the_vision_tower_of_files_from_before_is_found(tmp_path: Path, adapt: Adapt) -> None:
    """LLaVA's on the hub have a prefix more than those that transformers 5 saves from a new model."""
    model = build("llava")
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    old = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in load_file(file).items()}
    assert len(old.keys() - load_file(file).keys()) > 30
    save_file(old, file, {"format": "pt"})
    adapter = made(model, ["q_proj", "multi_modal_projector.linear_1"], tmp_path / "adapter")
    assert_merges(model, tmp_path / "base", adapter, tmp_path)
    on_files = tmp_path / "on files"
    assert adapt("apply", tmp_path / "base", "--plugin", "lora", "--target", "q_proj", "--target", "fc1", "-o", on_files).code == 0
    again = tg.load(build("llava"), on_files)
    assert {site.name for site in again.sites} == {name for name, _ in build("llava").named_modules() if name.endswith(("q_proj", "fc1"))}


def test_norms_from_the_days_of_gamma_and_beta_are_replaced(tmp_path: Path) -> None:
    model = build("bert_lm")
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor for name, tensor in load_file(file).items()}
    save_file(old, file, {"format": "pt"})
    adapter = made(model, ["query"], tmp_path / "adapter", also_train=["cls.predictions.transform"])
    assert_merges(model, tmp_path / "base", adapter, tmp_path)


def test_without_transformers_it_says_what_to_install(vit: tuple[Path, Path], adapt: Adapt, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    problems = refused(*vit, adapt)
    assert re.search(r"^vit\.layers\.0\.attention\.q_proj: the base has no such layer.*install torchgraft\[hf\]", problems[0])


@pytest.mark.parametrize("change", [{"model_type": "no such"}, {"hidden_size": "much"}, {"architectures": 3}], ids=str)
def test_a_config_that_transformers_cannot_read_is_no_traceback(vit: tuple[Path, Path], change: dict[str, Any], adapt: Adapt) -> None:
    base, adapter = vit
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    problems = refused(base, adapter, adapt)
    assert re.search(r"the base has no such layer.*transformers' names for a [\w ]+'s layers could not be tried", problems[0])


def test_a_transformers_that_has_changed_is_no_traceback(vit: tuple[Path, Path], adapt: Adapt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(conversion_mapping, "get_model_conversion_mapping")
    assert "the base has no such layer" in refused(*vit, adapt)[0]
    model = build("vit")
    before = snapshot(model)
    rename(vit[1], "vit.layers", "vit.encoder.layer")
    with pytest.raises(tg.PairingError, match="the files of a ViTForImageClassification could not be tried"):
        tg.load(model, vit[1])
    assert snapshot(model) == before


def test_a_checkpoint_without_architectures_is_the_bare_model(vit: tuple[Path, Path], adapt: Adapt) -> None:
    base, adapter = vit
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "architectures"}))
    assert adapt("check", base, adapter).code == 0
