"""An adapter that does not fit its base is refused, with the layer's name and the reason, and nothing is changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import models
import torchgraft as tg
from saved_adapters import add, agree, drop, edit_json, put, rename, snapshot

SITE = "model.layers.1.self_attn.q_proj"
A, B = f"base_model.model.{SITE}.lora_A.weight", f"base_model.model.{SITE}.lora_B.weight"
HEAD = "base_model.model.lm_head.weight"
FORMS = ["ours", "peft"]

Adapt = Callable[..., Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    models.build("llama").save_pretrained(directory)
    return directory


def llama(seed: int = 0) -> nn.Module:
    """Partly frozen, so that it shows if a failed load leaves all frozen or all trainable."""
    model = models.build("llama", seed)
    model.get_submodule("model.layers.0.mlp").requires_grad_(False)
    return model


@pytest.fixture
def adapter(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An adapter on `base`, with our record beside PEFT's files or, if the test asks for "peft", without."""
    made = tg.apply(llama(), "lora", ["q_proj", "down_proj"], rank=3, also_train=["lm_head"])
    models.perturb_(made.parameters())
    made.save(tmp_path / "adapter")
    if getattr(request, "param", "ours") == "peft":
        (tmp_path / "adapter" / "torchgraft.json").unlink()
    return tmp_path / "adapter"


both_forms = pytest.mark.parametrize("adapter", FORMS, indirect=True)
as_peft_wrote_it = pytest.mark.parametrize("adapter", ["peft"], indirect=True)


def claim_rank_5(directory: Path) -> None:
    edit_json(directory / "adapter_config.json", r=5)
    if (directory / "torchgraft.json").exists():
        config = json.loads((directory / "torchgraft.json").read_bytes())["config"]
        edit_json(directory / "torchgraft.json", config=config | {"rank": 5})
        agree(directory)


class Damage(NamedTuple):
    do: Callable[[Path], None]
    says: str  # what one of the problems must say


DAMAGES = {
    "a tensor is missing": Damage(drop(A), rf"{re.escape(A)}' is missing"),
    "a site's tensors are missing": Damage(drop(A, B), rf"{SITE}.*(is missing|no tensor)"),
    "a tensor is left over": Damage(add(f"base_model.model.{SITE}.lora_C.weight", 3), rf"{SITE}: unexpected .*lora_C\.weight"),
    "a site is unknown": Damage(
        lambda d: rename(d, "layers.1.self_attn.q_proj", "layers.1.self_attn.q_porj"),
        r"model\.layers\.1\.self_attn\.q_porj: the base has no such layer; near names: .*q_proj",
    ),
    "a site is no layer of weights": Damage(add("base_model.model.model.norm.lora_A.weight", 3, 32), r"model\.norm: .*"),
    "A is too narrow": Damage(put(A, lambda a: a[:, 1:]), rf"{re.escape(A)}' has the shape \[3, 31\], expected \[3, 32\]"),
    "B has another rank": Damage(put(B, lambda b: b[:, :2]), rf"{re.escape(B)}' has the shape \[32, 2\], expected \[32, 3\]"),
    "A is a vector": Damage(put(A, lambda a: a.flatten()), rf"{re.escape(A)}' has the shape \[96\], expected \[3, 32\]"),
    "A was saved by ZeRO-3": Damage(put(A, lambda a: a.new_empty(0)), rf"{re.escape(A)}' is empty.*ZeRO-3.*save it gathered"),
    "a whole module is missing": Damage(drop(HEAD), r"lm_head"),
    "a whole module has another shape": Damage(put(HEAD, lambda w: w[:5]), r"lm_head\.weight' has the shape \[5, 32\]"),
    "a whole module is unknown": Damage(lambda d: rename(d, "lm_head", "lm_haed"), r"lm_haed: the base has no such module; near.*lm_head"),
    "the config has another rank": Damage(claim_rank_5, rf"{re.escape(A)}' has the shape \[3, 32\], expected \[5, 32\]"),
    "names are another model's": Damage(lambda d: rename(d, "self_attn", "attn"), r"attn\.q_proj: the base has no such layer"),
}
NOT_FINITE = {
    "NaN": Damage(put(A, lambda a: a.index_fill(0, torch.tensor(1), torch.nan)), rf"{SITE}: .*NaN or infinite"),
    "infinite": Damage(put(B, lambda b: b.index_fill(1, torch.tensor(1), -torch.inf)), rf"{SITE}: .*NaN or infinite"),
    "NaN in a whole module": Damage(put(HEAD, lambda w: w.index_fill(0, torch.tensor(9), torch.nan)), r"lm_head.*NaN or infinite"),
}


def refused_by_load(model: nn.Module, directory: Path, error: type[tg.TorchgraftError] = tg.PairingError) -> Any:
    before = snapshot(model)
    with pytest.raises(error) as caught:
        tg.load(model, directory)
    assert snapshot(model) == before
    return caught.value


def refused_by_command(adapt: Adapt, base: Path, directory: Path) -> list[str]:
    """The problems that check lists; merge must stop at the first of them and leave nothing behind."""
    check, document = adapt("check", base, directory), adapt("check", base, directory, "--json")
    assert (check.code, document.code) == (2, 2), check.err
    problems = json.loads(document.out)["problems"] if document.out else [check.err.removeprefix("error: ").strip()]
    if document.out:
        found_there = json.loads(document.out)
        assert (found_there["ok"], found_there["problems"], found_there["renamed"]) == (False, problems, {})
        assert check.out == "".join(f"problem: {problem}\n" for problem in problems)
    assert problems[0] in refused_by_merge(adapt, base, directory)
    return problems


def refused_by_merge(adapt: Adapt, base: Path, directory: Path) -> str:
    before = set(directory.parent.iterdir())
    merge = adapt("merge", base, directory, "-o", directory.parent / "merged")
    assert merge.code == 2, merge.err
    assert re.fullmatch(r"error: [^\n]+\n", merge.err)
    assert set(directory.parent.iterdir()) == before
    return str(merge.err)


def found(says: str, problems: tuple[str, ...] | list[str]) -> bool:
    return any(re.search(says, problem) for problem in problems)


def assert_refused(says: str, directory: Path, base: Path, adapt: Adapt, error: type[tg.TorchgraftError] = tg.PairingError) -> None:
    """By load, check and merge, each with that reason."""
    raised = refused_by_load(llama(), directory, error)
    problems = raised.problems if isinstance(raised, tg.PairingError) else [str(raised)]
    assert found(says, problems), problems
    listed = refused_by_command(adapt, base, directory)
    assert found(says, listed), listed


def test_a_config_that_says_other_than_the_record_is_refused(adapter: Path, base: Path, adapt: Adapt) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="elsewhere", peft_version="1")
    assert adapt("check", base, adapter).code == 0
    edit_json(adapter / "adapter_config.json", lora_alpha=99)
    with pytest.raises(tg.FileFormatError, match=r"adapter_config\.json: this file changed"):
        tg.load(llama(), adapter)
    assert adapt("check", base, adapter).code == 2


@both_forms
def test_the_undamaged_adapter_fits(adapter: Path, base: Path, adapt: Adapt) -> None:
    assert len(tg.load(llama(), adapter).sites) == 4
    verdict = json.loads(adapt("check", base, adapter, "--json").out)
    assert (verdict["ok"], verdict["problems"], verdict["renamed"]) == (True, [], {})
    is_peft = not (adapter / "torchgraft.json").exists()
    assert ["PEFT records only names and shapes" in note for note in verdict["notes"]] == [True] * is_peft
    assert adapt("merge", base, adapter, "-o", adapter.parent / "merged").code == 0


@both_forms
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_adapter_is_refused(damage: Damage, adapter: Path, base: Path, adapt: Adapt) -> None:
    damage.do(adapter)
    assert_refused(damage.says, adapter, base, adapt)


@both_forms
@pytest.mark.parametrize("damage", NOT_FINITE.values(), ids=NOT_FINITE)
def test_an_adapter_that_diverged_is_neither_loaded_nor_merged(damage: Damage, adapter: Path, base: Path, adapt: Adapt) -> None:
    damage.do(adapter)
    assert found(damage.says, [str(refused_by_load(llama(), adapter))])
    assert found(damage.says, [refused_by_merge(adapt, base, adapter)])


def test_every_problem_is_listed(adapter: Path) -> None:
    drop(A, HEAD)(adapter)
    error = refused_by_load(llama(), adapter)
    assert len(error.problems) == 2
    assert found(re.escape(A), error.problems)
    assert found(re.escape(HEAD), error.problems)
    assert str(error) == f"{adapter} does not fit LlamaForCausalLM: {error.problems[0]} (and 1 more: 'adapt check' lists them)"


@pytest.mark.parametrize("damage", [*NOT_FINITE.values(), DAMAGES["a tensor is missing"]], ids=[*NOT_FINITE, "missing"])
def test_a_failed_load_leaves_other_adapters_alone(damage: Damage, adapter: Path) -> None:
    model = llama()
    other = tg.apply(model, "lora", ["k_proj", "down_proj"], rank=2, name="other")
    models.perturb_(other.parameters())
    damage.do(adapter)
    refused_by_load(model, adapter)
    assert list(tg.adapters(model)) == ["other"]


def test_a_second_adapter_of_the_same_name_is_refused(adapter: Path) -> None:
    model = llama()
    tg.load(model, adapter)
    assert re.search(r"'default'.*choose another name", str(refused_by_load(model, adapter, tg.AttachError)))


def test_another_model_of_the_same_shapes_is_refused(adapter: Path, tmp_path: Path, adapt: Adapt) -> None:
    other = llama(seed=1)
    other.save_pretrained(tmp_path / "other")
    says = rf"{SITE}: the base's weight is not the one that the adapter was made for: another model"
    error = refused_by_load(other, adapter)
    assert found(says, error.problems)
    assert found(says, refused_by_command(adapt, tmp_path / "other", adapter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_model_in_another_dtype_is_accepted(dtype: torch.dtype, adapter: Path, base: Path, tmp_path: Path, adapt: Adapt) -> None:
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    assert model.lm_head.weight.dtype == dtype
    model.save_pretrained(tmp_path / "other")
    assert adapt("check", tmp_path / "other", adapter).code == 0
    tg.load(model, adapter).save(tmp_path / "again")
    tg.load(llama(), tmp_path / "again")  # and the other way: made on that dtype, for the float32 original
    assert adapt("check", base, tmp_path / "again").code == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_was_merged_into_is_refused(dtype: torch.dtype, tmp_path: Path, adapt: Adapt) -> None:
    model = llama().to(dtype)
    model.save_pretrained(tmp_path / "base")
    one = tg.apply(model, "lora", ["q_proj", "down_proj"], rank=3)
    models.perturb_(one.parameters())
    one.save(tmp_path / "one")
    one.merge()
    says = rf"{SITE}: .*merged into"
    error = refused_by_load(model, tmp_path / "one")
    assert found(says, error.problems)
    assert one.merged
    assert adapt("merge", tmp_path / "base", tmp_path / "one", "-o", tmp_path / "out").code == 0
    assert found(says, json.loads(adapt("check", tmp_path / "out", tmp_path / "one", "--json").out)["problems"])
    assert "merged into it already" in refused_by_merge(adapt, tmp_path / "out", tmp_path / "one")
    one.unmerge()
    tg.load(model, tmp_path / "one", name="two")


def holding(layer: nn.Module) -> nn.Module:
    model = nn.Module()
    model.h = nn.ModuleList([nn.ModuleDict({"c_proj": layer})])
    return model


def test_a_square_layer_of_another_kind_is_refused(tmp_path: Path, adapt: Adapt) -> None:
    """The weights, and so the fingerprints, are the same; only their orientation is not."""
    transposed, linear = holding(Conv1D(8, 8)), holding(nn.Linear(8, 8))
    linear.load_state_dict(transposed.state_dict())
    tg.apply(transposed, "lora", ["c_proj"], rank=2).save(tmp_path / "adapter")
    says = r"h\.0\.c_proj: the adapter expects a Conv1D, the base has a Linear"
    assert found(says, [str(refused_by_load(linear, tmp_path / "adapter"))])
    for model_type in ("gpt2", "gpt_neo"):
        (tmp_path / model_type).mkdir()
        save_file(linear.state_dict(), tmp_path / model_type / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / model_type / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert found(says, refused_by_command(adapt, tmp_path / "gpt_neo", tmp_path / "adapter"))
    assert adapt("check", tmp_path / "gpt2", tmp_path / "adapter").code == 0


UNSUPPORTED: dict[str, Any] = {
    "bias": "all",
    "lora_bias": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2], [1, 2]],
    "alora_invocation_tokens": [5, 6],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "a_key_of_the_future": True,
    "peft_type": "IA3",
    "init_lora_weights": "pissa",  # PEFT then loads it onto a base that it changes first
}


@as_peft_wrote_it
@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_peft_can_do_and_we_cannot_is_refused(key: str, adapter: Path, base: Path, adapt: Adapt) -> None:
    edit_json(adapter / "adapter_config.json", **{key: UNSUPPORTED[key]})
    assert_refused(f"{key}.*{re.escape(str(UNSUPPORTED[key]))}", adapter, base, adapt)


@as_peft_wrote_it
def test_dora_without_its_plugin_is_refused(adapter: Path, base: Path, adapt: Adapt, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tg.Registry([point for point in entry_points(group="torchgraft") if point.name == "lora"])
    monkeypatch.setattr("torchgraft.pairing.native.registry", lambda: alone)
    monkeypatch.setattr("torchgraft.pairing.peft.registry", lambda: alone)
    edit_json(adapter / "adapter_config.json", use_dora=True)
    assert_refused("no installed method reads PEFT's peft_type 'LORA' with use_dora; see 'adapt plugins list'", adapter, base, adapt)


MALFORMED: dict[str, Any] = {
    "r": "8",
    "lora_alpha": [16],
    "rank_pattern": {"q_proj": 0},
    "alpha_pattern": {"q_proj": "much"},
    "target_modules": "q_proj(",
    "exclude_modules": "*",
}


@as_peft_wrote_it
@pytest.mark.parametrize("values", [{key: value} for key, value in MALFORMED.items()] + [{"rank_pattern": {"q_proj(": 4}}], ids=str)
def test_a_malformed_peft_config_is_refused(values: dict[str, Any], adapter: Path, base: Path, adapt: Adapt) -> None:
    edit_json(adapter / "adapter_config.json", **values)
    is_odd = values.keys() & {"r", "lora_alpha"}  # no number at all
    assert_refused(r"adapter_config\.json", adapter, base, adapt, tg.FileFormatError if is_odd else tg.PairingError)


@as_peft_wrote_it
def test_a_layer_that_the_config_targets_needs_tensors(adapter: Path, base: Path, adapt: Adapt) -> None:
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "down_proj", "layers.1.self_attn.v_proj"])
    says = r"model\.layers\.1\.self_attn\.v_proj: target_modules match this layer, but the adapter has no tensor for it"
    problems = refused_by_command(adapt, base, adapter)
    assert [bool(re.search(says, problem)) for problem in problems] == [True]
    assert found(says, [str(refused_by_load(llama(), adapter))])


def into_a_subfolder(directory: Path) -> None:
    files = list(directory.iterdir())
    (directory / "french").mkdir()
    for file in files:
        file.rename(directory / "french" / file.name)


def change_a_byte(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


def leave_only(*names: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        for path in directory.iterdir():
            if path.name not in names:
                path.unlink()

    return change


FILES = {
    "another file beside the record": Damage(change_a_byte, r"adapter_model\.safetensors: .*hashes differ.*remove torchgraft\.json"),
    "no tensors": Damage(leave_only("torchgraft.json", "adapter_config.json"), r"adapter_model\.safetensors is missing"),
    "nothing": Damage(leave_only(), r"not an adapter directory: it contains no adapter_config\.json$"),
    "only tensors": Damage(leave_only("adapter_model.safetensors"), r"no adapter_config\.json"),
    "an adapter in a subfolder": Damage(into_a_subfolder, r"it contains adapters: french"),
    "a record of the future": Damage(lambda d: edit_json(d / "torchgraft.json", format=99), r"format 99.*upgrade"),
    "a record without sites": Damage(lambda d: edit_json(d / "torchgraft.json", sites=None), r"torchgraft\.json: invalid record: sites: "),
    "a record that is no JSON": Damage(lambda d: (d / "torchgraft.json").write_text("{") and None, r"json: not readable as JSON"),
    "no directory": Damage(lambda d: d.rename(d.with_name("elsewhere")) and None, r"no such file or directory"),
}


@pytest.mark.parametrize("damage", FILES.values(), ids=FILES)
def test_what_is_no_sound_adapter_directory_is_refused(damage: Damage, adapter: Path, base: Path, adapt: Adapt) -> None:
    damage.do(adapter)
    assert_refused(damage.says, adapter, base, adapt, tg.FileFormatError)


def test_a_model_in_the_adapter_s_place_and_the_reverse_are_refused(adapter: Path, base: Path, adapt: Adapt) -> None:
    assert "not an adapter directory" in str(refused_by_load(llama(), base, tg.FileFormatError))
    assert re.search(r"adapter directory.*base model is needed", adapt("check", adapter, adapter).err)
    assert "give the adapter's directory" in str(refused_by_load(llama(), adapter / "adapter_model.safetensors", tg.FileFormatError))


def test_a_method_that_is_not_installed_is_named(adapter: Path, base: Path, adapt: Adapt) -> None:
    edit_json(adapter / "torchgraft.json", method={"name": "lorra", "distribution": "someones", "version": "1"})
    assert_refused(r"no plugin 'lorra'.*lora", adapter, base, adapt, tg.PluginError)


def test_check_lists_every_problem_of_every_sort_at_once(adapter: Path, base: Path, tmp_path: Path, adapt: Adapt) -> None:
    out = tmp_path / "merged"
    assert adapt("merge", base, adapter, "-o", out).code == 0
    result = adapt("check", out, adapter, "--json")
    problems = json.loads(result.out)["problems"]
    assert result.code == 2
    assert sum("is merged into it already" in problem for problem in problems) == 1
    assert any("not the one that the adapter was made for" in problem for problem in problems)
    damaged = tmp_path / "damaged"
    shutil.copytree(adapter, damaged)
    drop(HEAD)(damaged)
    put(A, lambda tensor: tensor * float("inf"))(damaged)
    put(B, lambda tensor: tensor[:, :0])(damaged)
    put(A.replace("layers.1", "layers.0"), lambda tensor: tensor.to(torch.int64))(damaged)
    add(f"base_model.model.{SITE}.lora_C.weight", 3)(damaged)
    result = adapt("check", base, damaged, "--json")
    problems = json.loads(result.out)["problems"]
    assert (result.code, result.err) == (2, "")
    for says in (
        re.escape(HEAD),
        "NaN or infinite",
        "is empty",
        "has the type int64, expected one of bfloat16",
        rf"unexpected adapter tensor .*{SITE}\.lora_C\.weight",
    ):
        assert found(says, problems), says
    assert adapt("check", base, damaged).out.count("problem: ") == len(problems) == 5
    (damaged / "adapter_model.safetensors").write_bytes(b"junk")
    result = adapt("check", base, damaged, "--json")
    assert (result.code, json.loads(result.out)["ok"]) == (2, False)
