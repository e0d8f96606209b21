"""Every call of a hook is in the log, with its result unchanged; the command sums them up."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

import torchgraft as tg


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHGRAFT_AUDIT", str(tmp_path / "log.jsonl"))
    return tmp_path / "log.jsonl"


def test_every_call_is_logged(log: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    adapter = tg.apply(model, "dora", ["*"], rank=2)
    torch.nn.init.normal_(dict(adapter.named_parameters())["0.B"])
    adapter.merge()
    merged = model[0].weight.detach().clone()
    adapter.unmerge()
    assert not torch.equal(merged, before)
    assert torch.equal(model[0].weight, before)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["site"] for entry in entries if entry["hook"] == "init"] == ["0", "1"]
    for hook in ("merge", "unmerge"):
        assert {tuple(entry["shape"]) for entry in entries if entry["hook"] == hook} == {(4, 6), (3, 4)}
    shown = subprocess.run(["adapt", "audit", log], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("init: 2 calls, ")
    assert "\nmerge: 2 calls, " in shown


def test_the_command_stands_in_the_help() -> None:
    shown = subprocess.run(["adapt", "--help"], capture_output=True, text=True, check=True).stdout
    assert "audit" in shown
    missing = subprocess.run(["adapt", "audit", "nowhere"], capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ")
