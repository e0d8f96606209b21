"""Damaged and foreign files: a merge and an unmerge refuse them or leave them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import torchgraft as tg
from small_checkpoint import merge_one_layer
from torchgraft.on_files.merge_record import checksum


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return merge_one_layer(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_an_adapter_is_not_merged_into_a_quantized_weight(tmp_path: Path, merged: Path, dtype: torch.dtype) -> None:
    save_file({"q_proj.weight": torch.ones(6, 4).to(dtype)}, tmp_path / "quantized.safetensors")
    with pytest.raises(tg.PairingError, match="quantized"):
        tg.merge_checkpoint(tmp_path / "quantized.safetensors", tmp_path / "adapter", tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


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
    for document, says in ((record | change, "it changed after the merge"), (signed(record | change), "(adapters|earlier|sites)")):
        (merged / "torchgraft_merge.json").write_text(json.dumps(document))
        with pytest.raises(tg.FileFormatError, match=rf"torchgraft_merge\.json: invalid record: {says}"):
            tg.merge_checkpoint(merged, tmp_path / "adapter", tmp_path / "out")


def signed(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"checksum": checksum(record)}
