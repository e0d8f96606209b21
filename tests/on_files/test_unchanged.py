"""A merge that changes nothing, in all layers or in some, is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import torchgraft as tg
from models import perturb_
from references import all_tensors
from saved_adapters import edit_tensors
from small_checkpoint import LAYERS, Small, make_adapter, write_model
from torchgraft.arithmetic.exact import changed_entries
from torchgraft.method.resize import Resize
from torchgraft.on_files.check import check


def zeroed(*layers: str) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name and any(layer in name for layer in layers):
                tensor.zero_()

    return change


def shrunk(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        if "lora_B" in name:
            tensors[name] = tensors[name] * 1e-9


def restored_magnitude(base: Path) -> Any:
    """DoRA at its initialization: B = 0 and the magnitude is the norm of each row."""

    def change(tensors: dict[str, Tensor]) -> None:
        zeroed(*LAYERS)(tensors)
        for name in list(tensors):
            if name.endswith("magnitude_vector"):
                weight = load_file(base / "model.safetensors")[f"{name.split('.')[2]}.weight"].double()
                tensors[name] = weight.norm(dim=1).float()

    return change


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", Small())


@pytest.mark.parametrize(
    ("change", "dead"),
    [(zeroed(*LAYERS), 3), (zeroed("up_proj"), 1), (shrunk, 3)],
    ids=["all layers", "one layer", "lost in rounding"],
)
def test_unchanged_tensors_are_refused_unless_allowed(change: Any, dead: int, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    edit_tensors(adapter, change)
    with pytest.raises(tg.MergeError, match=rf"^{dead} of 3 merged tensors are the base's, unchanged .*--allow-unchanged"):
        tg.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = tg.merge_checkpoint(base, adapter, tmp_path / "out", allow_unchanged=True)
    assert any(note.startswith(f"{dead} of 3 merged tensors") for note in report.notes)
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    counts = {f"{layer}.weight": int((before[f"{layer}.weight"] != after[f"{layer}.weight"]).sum()) for layer in LAYERS}
    assert sorted(counts.values())[:dead] == [0] * dead
    assert report.changed == {name: count / before[name].numel() for name, count in sorted(counts.items())}
    assert json.loads((tmp_path / "out/torchgraft_merge.json").read_text())["changed"] == counts


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("dora", {}), ("adalora", {}), ("lora", {"dtype": "float32"})], ids=str)
def test_an_untrained_adapter_is_refused_whatever_its_method(method: str, options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", method)
    edit_tensors(adapter, restored_magnitude(base) if method == "dora" else lambda tensors: [each.zero_() for each in tensors.values()])
    with pytest.raises(tg.MergeError, match="are the base's, unchanged"):
        tg.merge_checkpoint(base, adapter, tmp_path / "out", **options)


def test_a_factor_of_zero_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(tg.MergeError, match="3 of 3 merged tensors are the base's, unchanged"):
        tg.merge_checkpoint(base, {make_adapter(tmp_path / "adapter"): 0.0}, tmp_path / "out")


def test_one_adapter_that_changes_a_layer_is_enough(base: Path, tmp_path: Path) -> None:
    one, other = make_adapter(tmp_path / "one"), make_adapter(tmp_path / "other", seed=1)
    edit_tensors(one, zeroed(*LAYERS))
    assert min(tg.merge_checkpoint(base, {one: 1.0, other: 1.0}, tmp_path / "out").changed.values()) > 0.5


def test_layers_of_rank_0_may_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    model = Small(torch.float32)
    adapter = tg.apply(model, "adalora", list(LAYERS), rank=4)
    perturb_(adapter.parameters())
    part = adapter.parts["up_proj"]
    empty = {"A": part.A[:0], "B": part.B[:, :0]}
    change = Resize(empty, part.config.at(0), dict.fromkeys(empty, lambda moment, power: moment))
    adapter.resize({"up_proj": change}, torch.optim.SGD(adapter.parameters(), 0.1))
    adapter.save(tmp_path / "adapter")
    assert tg.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out").changed["up_proj.weight"] == 0


def test_a_module_that_is_saved_whole_may_be_the_bases_own(base: Path, tmp_path: Path) -> None:
    model = Small(torch.bfloat16)
    adapter = tg.apply(model, "lora", ["q_proj"], also_train=["head"])
    with torch.no_grad():
        for part in adapter.parts["q_proj"].parameters():
            part.normal_()
    adapter.save(tmp_path / "adapter")
    report = tg.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert report.changed["head.weight"] == report.changed["head.bias"] == 0
    assert report.changed["q_proj.weight"] > 0.9


def test_nan_that_stays_nan_is_no_change() -> None:
    original = torch.full((300,), torch.nan)
    original[3:] = 1
    merged = original.clone()
    assert changed_entries(original, merged) == 0
    merged[10] = 2
    assert changed_entries(original, merged) == 1
    assert changed_entries(original.double(), merged.half()) == 1
    assert changed_entries(torch.tensor([-0.0, 1, 2]), torch.tensor([0.0, 1, 2])) == 0
    assert changed_entries(torch.ones(4).to(torch.float8_e4m3fn), torch.tensor([1.0, 1, 2, 1]).to(torch.float8_e4m3fn)) == 1


def test_check_names_the_layers_on_which_an_additive_change_is_zero(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    assert not check(base, adapter).notes
    edit_tensors(adapter, zeroed("up_proj"))
    verdict = check(base, adapter)
    assert not verdict.problems
    assert [note for note in verdict.notes if "changes nothing on 1 of its 3 layers (up_proj)" in note]

    def late(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.up_proj.lora_B.weight"][-1] = 1  # zero in all rows but the last

    edit_tensors(adapter, late)
    assert not check(base, adapter).notes


def test_a_base_with_an_infinite_entry_is_merged_with_a_factor_and_verified(tmp_path: Path) -> None:
    model = Small()
    with torch.no_grad():
        model.q_proj.weight[1, 1], model.up_proj.weight[0, 0] = torch.inf, -torch.inf
        model.down_proj.weight[2, 3] = torch.nan
    base = write_model(tmp_path / "base", model)
    adapter = make_adapter(tmp_path / "adapter", model=model)
    for number, factor in enumerate((1.0, 0.5, -2.0)):
        assert tg.merge_checkpoint(base, {adapter: factor}, tmp_path / f"out{number}").verified
        merged = all_tensors(tmp_path / f"out{number}")
        assert merged["q_proj.weight"][1, 1] == torch.inf
        assert merged["up_proj.weight"][0, 0] == -torch.inf
        assert merged["down_proj.weight"][2, 3].isnan()
        tg.unmerge_checkpoint(tmp_path / f"out{number}", tmp_path / f"restored{number}")
