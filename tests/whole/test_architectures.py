"""Real architectures, small: an adapter made in memory, on files or by PEFT, merged into files that transformers wrote and reads.

Adapter and files need not call a layer the same: transformers 5 renames between memory and files, and a head puts a prefix before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import models
import torchgraft as tg
from architectures import OTHERS, assert_merges, logits, read
from peft_reference import WARNINGS_OF_PEFT, peft_trains

pytestmark = WARNINGS_OF_PEFT

Adapt = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """What is adapted in one architecture, by names in memory, and the same by the names in the files that it writes."""

    family: str
    targets: list[str]
    on_files: list[str]
    peft: dict[str, Any]
    also_train: str = ""
    also_on_files: str = ""


def alike(family: str, targets: list[str], peft: dict[str, Any], also_train: str = "") -> Case:
    return Case(family, targets, targets, peft, also_train, also_train)


CASES = [
    alike("llama", ["@attention", "*.layers.1.mlp.*"], {"target_modules": ["q_proj", "v_proj", "down_proj"]}, "lm_head"),
    alike("qwen2", ["*.{q,k,v}_proj", "@mlp"], {"target_modules": "all-linear"}),
    alike("mixtral", ["@attention"], {"target_modules": ["k_proj", "o_proj"]}, "lm_head"),
    alike("gpt2", ["c_attn", "c_proj", "c_fc"], {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    Case(
        "gpt_neox",
        ["query_key_value", "@mlp", "lm_head"],
        ["query_key_value", "@mlp", "embed_out"],
        {"target_modules": ["query_key_value", "dense"], "modules_to_save": ["lm_head"]},
    ),
    Case("gpt_neox", ["dense"], ["dense"], {"target_modules": ["dense_h_to_4h", "lm_head"]}, "lm_head", "embed_out"),
    alike("bert", ["@attention", "@mlp"], {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}, "classifier"),
    alike("t5", ["@attention", "wi_0", "wo"], {"target_modules": ["q", "v", "wo"]}),
    Case(
        "vit",
        ["{q,v}_proj", "*.layers.1.attention.o_proj", "fc1"],
        ["query", "value", "*.layer.1.attention.output.dense", "intermediate.dense"],
        {"target_modules": ["q_proj", "fc2"], "modules_to_save": ["classifier"]},
        "classifier",
        "classifier",
    ),
    alike("whisper", ["{q,k,out}_proj", "fc1"], {"target_modules": ["q_proj", "v_proj"]}),
    Case(
        "llava",
        ["*.language_model.*.{q,v}_proj", "*.vision_tower.*.fc1", "@head"],
        ["language_model.*.{q,v}_proj", "vision_tower.*.fc1", "@head"],
        {"target_modules": ["q_proj", "down_proj", "out_proj"]},
    ),
    alike("clip", ["{q,v}_proj", "fc2"], {"target_modules": ["k_proj", "fc1"]}),
]
each_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.family) for case in CASES])


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return (models.FAMILIES | OTHERS)[family]().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def get(family: str, dtype: torch.dtype = torch.float32) -> Path:
        directory = tmp_path_factory.mktemp(family)
        build(family).to(dtype).save_pretrained(directory)
        return directory

    return get


def assert_adapts_in_memory(case: Case, method: str, dtype: torch.dtype, saved: Callable[..., Path], tmp_path: Path) -> None:
    # T5 does not scale its attention's scores: with larger ones, one rounding turns a softmax over.
    scale = 0.3 if dtype == torch.float32 else 0.1
    directory = saved(case.family, dtype)
    model = read(build(case.family).to(dtype), directory)
    adapter = tg.apply(model, method, case.targets, rank=3, also_train=[case.also_train] if case.also_train else [])
    models.perturb_(adapter.parameters(), scale)
    adapter.save(tmp_path / "adapter")
    assert_merges(model, directory, tmp_path / "adapter", tmp_path)


@each_case
def test_an_adapter_made_in_memory_is_merged_into_the_files(case: Case, saved: Callable[..., Path], tmp_path: Path) -> None:
    assert_adapts_in_memory(case, "lora", torch.float32, saved, tmp_path)


@each_case
def test_the_same_in_bfloat16(case: Case, saved: Callable[..., Path], tmp_path: Path) -> None:
    assert_adapts_in_memory(case, "lora", torch.bfloat16, saved, tmp_path)


@pytest.mark.parametrize("family", ["vit", "gpt2", "llava"])
def test_the_same_with_a_method_that_depends_on_the_weight(family: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    case = next(case for case in CASES if case.family == family)
    assert_adapts_in_memory(case, "dora", torch.float32, saved, tmp_path)


@each_case
def test_an_adapter_made_on_the_files_is_loaded_in_memory(case: Case, saved: Callable[..., Path], tmp_path: Path, adapt: Adapt) -> None:
    directory = saved(case.family)
    options = [word for target in case.on_files for word in ("--target", target)]
    options += ["--also-train", case.also_on_files] if case.also_on_files else []
    made = adapt("apply", directory, "--plugin", "lora", *options, "--rank", 3, "-o", tmp_path / "made", "--json")
    assert made.code == 0, made.err
    model = read(build(case.family), directory)
    adapter = tg.load(model, tmp_path / "made")
    assert len(adapter.sites) == json.loads(made.out)["matched"]
    torch.testing.assert_close(logits(model), logits(read(model, directory)))
    models.perturb_(adapter.parameters())
    adapter.save(tmp_path / "trained")  # under the names in memory
    assert_merges(model, directory, tmp_path / "trained", tmp_path)


@each_case
def test_an_adapter_of_peft_is_merged_into_the_files(case: Case, saved: Callable[..., Path], tmp_path: Path) -> None:
    trained = peft_trains(build(case.family), tmp_path / "adapter", r=3, lora_alpha=5, **case.peft)
    assert isinstance(trained, peft.PeftModel)
    want = logits(trained)
    assert_merges(build(case.family), saved(case.family), tmp_path / "adapter", tmp_path, want)
    model = build(case.family)
    tg.load(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), want)


TIED = {"llama tied": "model.embed_tokens", "gpt2": "transformer.wte"}


@pytest.mark.parametrize(("family", "said"), [("llama tied", True), ("gpt2", True), ("gpt2", None)])
@pytest.mark.parametrize("ends", ["embedding", "head", "both", "trained embedding", "trained head"])
def test_a_tied_weight_is_untied_when_one_of_its_layers_is_merged_into(
    family: str, ends: str, said: bool | None, saved: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tmp_path / "base"
    shutil.copytree(saved(family), directory)
    config = json.loads((directory / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (directory / "config.json").write_text(json.dumps(config | ({"tie_word_embeddings": True} if said else {})))
    layers = {"embedding": [TIED[family]], "head": ["lm_head"], "both": [TIED[family], "lm_head"]}[ends.split()[-1]]
    model = read(build(family), saved(family))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    whole = ends.startswith("trained")
    adapter = tg.apply(model, "lora", ["@mlp"] if whole else layers, also_train=layers if whole else [])
    models.perturb_(adapter.parameters(), 0.3)
    adapter.save(tmp_path / "adapter")
    assert_merges(model, directory, tmp_path / "adapter", tmp_path)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_adapter_for_a_tied_head_is_made_on_files_and_loads(saved: Callable[..., Path], tmp_path: Path, adapt: Any) -> None:
    result = adapt("apply", saved("gpt2"), "--plugin", "lora", "--target", "lm_head", "-o", tmp_path / "adapter")
    assert (result.code, result.err) == (0, "")
    model = read(build("gpt2"), saved("gpt2"))
    adapter = tg.load(model, tmp_path / "adapter")
    models.perturb_(adapter.parameters(), 0.3)
    adapter.save(tmp_path / "adapter")
    assert_merges(model, saved("gpt2"), tmp_path / "adapter", tmp_path)


def test_one_file_whose_names_differ_is_merged_and_given_back_without_its_config(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = read(build("llava"), saved("llava"))
    adapter = tg.apply(model, "lora", ["*language_model*.q_proj"])
    models.perturb_(adapter.parameters(), 0.3)
    adapter.save(tmp_path / "adapter")
    report = tg.merge_checkpoint(saved("llava") / "model.safetensors", tmp_path / "adapter", tmp_path / "out")
    assert report.notes
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (saved("llava") / "model.safetensors").read_bytes()
