"""What version 0.1.0 wrote is read, and gives the same bits. `fixtures/make.py` shows how it was written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load
from torch import nn

import torchgraft as tg
from fixtures.make import MERGES, OPTIONS, digest

OLD = Path(__file__).parents[1] / "fixtures" / "0.1.0"
SUMS: dict[str, dict[str, dict[str, str]]] = json.loads((OLD / "sums.json").read_text())
ADAPTERS = (*OPTIONS, "head", "peft")


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a merge names its sources as they were given, relative to this directory."""
    monkeypatch.chdir(OLD.parent)


def base() -> nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(OLD / "base", dtype=torch.bfloat16)


def digests(model: nn.Module) -> dict[str, str]:
    return {key: digest(tensor) for key, tensor in model.state_dict().items() if ".adapters." not in key}


def content(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_old_adapter_is_saved_again_as_it_was(name: str, tmp_path: Path) -> None:
    old = OLD / "adapters" / name
    tg.load(base(), old).save(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (old / "adapter_model.safetensors").read_bytes()
    if name != "peft":
        before, after = (json.loads((directory / "torchgraft.json").read_text()) for directory in (old, tmp_path / "again"))
        for record in (before, after):  # the name of the base is the user's, and the version is the writer's
            del record["torchgraft"], record["base"], record["method"]["version"]
        assert after == before


@pytest.mark.parametrize("name", SUMS["in_memory"])
def test_an_old_adapter_merges_in_memory_to_the_same_bits_and_out_again(name: str) -> None:
    model = base()
    before = digests(model)
    adapter = tg.load(model, OLD / "adapters" / name)
    adapter.merge()
    assert digests(model) == SUMS["in_memory"][name]
    adapter.unmerge()
    assert digests(model) == before


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_of_old_adapters_is_the_old_merge(name: str, tmp_path: Path) -> None:
    names, options = MERGES[name]
    given: Any = {Path("0.1.0/adapters", adapter): 1.0 for adapter in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tg.TorchgraftWarning)  # adapters of quantized and of other weights are mixed
        tg.merge_checkpoint("0.1.0/base", given if len(names) > 1 else next(iter(given)), tmp_path / "merged", **options)
    old, new = content(OLD / "merged" / name), content(tmp_path / "merged")
    records = [json.loads(files.pop("torchgraft_merge.json")) for files in (old, new)]
    corrections = [load(files.pop("torchgraft_undo/corrections.safetensors")) for files in (old, new)]
    assert new == old
    assert corrections[1].keys() == corrections[0].keys()
    for key, tensor in corrections[0].items():  # sums in float64 differ in the last bits between processors
        torch.testing.assert_close(corrections[1][key], tensor, rtol=1e-12 if tensor.is_floating_point() else 0, atol=0)
    for record in records:  # the version is the writer's, and the notes are prose
        del record["torchgraft"], record["notes"]
    later = {key: records[1][key] for key in ("changed", "checksum", "format")}
    assert records[1] == records[0] | later
    assert any(records[1]["changed"].values())


@pytest.mark.parametrize("name", MERGES)
def test_an_old_merge_is_taken_out_again_to_the_last_bit(name: str, tmp_path: Path) -> None:
    report = tg.unmerge_checkpoint(OLD / "merged" / name, tmp_path / "base")
    assert report.restored_tensors > 0
    assert content(tmp_path / "base") == content(OLD / "base")
