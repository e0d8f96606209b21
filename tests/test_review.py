"""Ways in which a model or a file could end up half changed or silently wrong, each found once."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import torchgraft as tg
from models import Plain, perturb_


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A small checkpoint with an adapter merged into it."""
    save_file({"q_proj.weight": torch.randn(6, 4), "q_proj.bias": torch.zeros(6)}, tmp_path / "model.safetensors")
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 6)})
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    adapter = tg.apply(model, "lora", "q_proj", rank=2)
    perturb_(adapter.parameters())
    adapter.save(tmp_path / "adapter")
    tg.merge_checkpoint(tmp_path / "model.safetensors", tmp_path / "adapter", tmp_path / "merged")
    return tmp_path / "merged"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_an_adapter_is_not_merged_into_a_quantized_weight(tmp_path: Path, merged: Path, dtype: torch.dtype) -> None:
    save_file({"q_proj.weight": torch.ones(6, 4).to(dtype)}, tmp_path / "quantized.safetensors")
    with pytest.raises(tg.PairingError, match="quantized"):
        tg.merge_checkpoint(tmp_path / "quantized.safetensors", tmp_path / "adapter", tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("act", ["merge", "unmerge", "detach"])
def test_a_detached_adapter_changes_nothing(act: str) -> None:
    model = Plain()
    adapter = tg.apply(model, "lora", "@linear")
    perturb_(adapter.parameters())
    adapter.detach()
    before = bits(model)
    with pytest.raises(tg.AttachError, match="was detached"):
        getattr(adapter, act)()
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


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
    with pytest.raises(tg.AttachError, match="bypasses its forward"):
        tg.apply(model, "lora", "fc", rank=2, also_train=["out_proj"])
    model.fc.forward = model.fc.forward
    with pytest.raises(tg.AttachError, match="replaced on the instance"):
        tg.apply(nn.ModuleDict({"a": nn.Linear(4, 4), "fc": model.fc}), "lora", "a", rank=2, also_train=["fc"])


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


def test_unmerge_takes_nothing_unchecked_from_the_undo_folder(tmp_path: Path, merged: Path) -> None:
    planted = merged / "torchgraft_undo" / "base" / "model.safetensors"
    planted.parent.mkdir()
    planted.write_bytes(b"other weights")
    tg.unmerge_checkpoint(merged, tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_damaged_corrections_are_refused(tmp_path: Path, merged: Path) -> None:
    path = merged / "torchgraft_undo" / "corrections.safetensors"
    tensors = load_file(path)
    tensors["q_proj.weight#blocks"][0, 1] += 1
    save_file(tensors, path)
    with pytest.raises(tg.FileFormatError, match=r"corrections\.safetensors"):
        tg.unmerge_checkpoint(merged, tmp_path / "restored")


@pytest.mark.parametrize("change", [{"adapters": "x"}, {"adapters": [{}]}, {"earlier": 3}, {"sites": {"q_proj": {"kind": 3}}}])
def test_a_malformed_merge_record_is_the_users_error(tmp_path: Path, merged: Path, change: dict[str, object]) -> None:
    record = json.loads((merged / "torchgraft_merge.json").read_text())
    (merged / "torchgraft_merge.json").write_text(json.dumps(record | change))
    with pytest.raises(tg.FileFormatError, match="edited by hand"):
        tg.merge_checkpoint(merged, tmp_path / "adapter", tmp_path / "out")


def test_a_trained_head_that_leaves_the_range_of_float16_is_not_merged() -> None:
    model = Plain().half()
    adapter = tg.apply(model, "lora", "q_proj", also_train=["head"])
    adapter.copies["head"].module.float()
    with torch.no_grad():
        adapter.copies["head"].module.weight.fill_(1e5)
    before = bits(model)
    with pytest.raises(tg.MergeError, match=r"head: .*float16"):
        adapter.merge()
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_a_link_that_leads_nowhere_is_not_left_out_in_silence(tmp_path: Path, merged: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    (base / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(tg.FileFormatError, match=r"tokenizer\.json"):
        tg.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


def test_checkpoints_of_a_training_run_are_left_out_and_said(tmp_path: Path, merged: Path) -> None:
    base = tmp_path / "base"
    (base / "checkpoint-500").mkdir(parents=True)
    for place in (base, base / "checkpoint-500"):
        (place / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = tg.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert report.left_out == ("checkpoint-500/model.safetensors",)
    assert "checkpoint-500" in str(said[0].message)
    assert not (tmp_path / "out" / "checkpoint-500").exists()


def test_merging_while_disabled_does_not_break_the_block() -> None:
    model = Plain()
    adapter = tg.apply(model, "lora", "@linear")
    with adapter.disabled():
        adapter.merge()
    assert adapter.merged
    adapter.unmerge()
    assert adapter.active


def test_a_copy_of_the_model_trains_its_own_head() -> None:
    model = Plain()
    tg.apply(model, "lora", "q_proj", also_train=["head"])
    other = copy.deepcopy(model)
    copied = tg.adapters(other)["default"].copies["head"]
    assert copied.original is other.head
    assert copied.module is not tg.adapters(model)["default"].copies["head"].module
