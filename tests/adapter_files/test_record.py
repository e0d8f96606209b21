"""The record of an adapter is validated when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchgraft.adapter_files.record import parse_record
from torchgraft.errors import FileFormatError


def record(**changes: Any) -> dict[str, Any]:
    site = {"name": "a", "kind": "Linear", "shape": [3, 2], "dtype": "float32", "config": {}}
    tensors = {"file": "torchgraft.safetensors", "sha256": "0"}
    whole = {"format": 1, "method": {"name": "lora"}, "config": {}, "sites": [site], "also_train": [], "tensors": tensors}
    return whole | changes


def test_unknown_keys_are_ignored() -> None:
    parsed = parse_record(Path("torchgraft.json"), record(later="entry"))
    assert parsed.sites[0].shape == (3, 2)
    assert not parsed.state.values
    assert not parsed.state.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": [{"name": "a", "kind": "Linear", "dtype": "float32", "config": {}}]}, r"sites\[0\]\.shape is missing"),
        ({"config": []}, r"config: .*, found \[\]"),
        ({"also_train": [1]}, r"also_train\[0\]: .*, found 1"),
        ({"tensors": {"file": "../x", "sha256": ""}}, r"tensors\.file: .*, found '\.\./x'"),
        ({"state": {"values": {}}}, r"state\.sha256 is missing"),
    ],
)
def test_an_invalid_entry_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FileFormatError, match=rf"torchgraft\.json: invalid record: {message}"):
        parse_record(Path("torchgraft.json"), record(**changes))
