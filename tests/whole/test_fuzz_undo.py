"""Undo records from an attacker: whatever a record says, an unmerge gives the base's bytes or is refused with one line."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import torchgraft as tg
from models import perturb_
from references import tree
from spoiled_files import changes, spoiled
from torchgraft.on_files.merge_record import checksum

UNDO = "torchgraft_undo"
CORRECTIONS = f"{UNDO}/corrections.safetensors"
RECORD = "torchgraft_merge.json"


class Case:
    """A merged directory that tests spoil and restore, and its base."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.merged, self.out = folder, folder / "merged", folder / "out"
        torch.manual_seed(0)
        model = nn.ModuleDict({"q_proj": nn.Linear(4, 6), "v_proj": nn.Linear(4, 3, bias=False), "norm": nn.LayerNorm(3)})
        model["q_proj"].to(torch.bfloat16)
        base = folder / "base"
        base.mkdir()
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, base / "model.safetensors", {"format": "pt"})
        (base / "config.json").write_text('{"model_type": "x"}')
        (base / "tokenizer.json").write_text("{}")
        adapter = tg.apply(model, "dora", ["q_proj", "v_proj"], rank=2, also_train=["norm"])
        perturb_(adapter.parameters())
        adapter.save(folder / "adapter")
        (folder / "adapter/tokenizer.json").write_text('{"x": 1}')
        tg.merge_checkpoint(base, folder / "adapter", self.merged)
        self.base = tree(base)
        self.files = {path.relative_to(self.merged).as_posix(): path.read_bytes() for path in self.merged.rglob("*") if path.is_file()}

    def unmerge(self, *, forged: bool = False) -> str:
        """Unmerge; return the error's message, or "" if the base's bytes came back. Anything else fails.

        Whoever forges a whole record, with its checksum, decides which files the base has; each still has the base's bytes.
        """
        shutil.rmtree(self.out, ignore_errors=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tg.unmerge_checkpoint(self.merged, self.out)
        except tg.TorchgraftError as error:
            assert not self.out.exists()
            return str(error)
        assert tree(self.out).items() <= self.base.items()
        assert forged or tree(self.out) == self.base
        return ""

    def write(self, name: str, content: bytes) -> None:
        path = self.merged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def restore(self) -> None:
        for path in self.merged.rglob("*"):
            if path.is_file() and path.relative_to(self.merged).as_posix() not in self.files:
                path.unlink()
        for name, content in self.files.items():
            self.write(name, content)


def forge(case: Case, record: dict[str, Any]) -> None:
    case.write(RECORD, json.dumps(record | {"checksum": checksum(record)}).encode())


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("undo"))


@pytest.fixture(autouse=True)
def _restored(case: Case) -> Iterator[None]:
    yield
    case.restore()


def test_the_case_is_unmerged_to_the_base(case: Case) -> None:
    assert case.unmerge() == ""


@pytest.mark.slow
@pytest.mark.parametrize("flipped", [1, 0x80, 9], ids=["low bit", "high bit", "another digit"])
def test_any_changed_byte_gives_the_right_bits_or_is_refused(case: Case, flipped: int) -> None:
    for name, content in case.files.items():
        for place, byte in enumerate(content):
            case.write(name, content[:place] + bytes([byte ^ flipped]) + content[place + 1 :])
            case.unmerge()
        case.write(name, content)


def test_some_changed_bytes_give_the_right_bits_or_are_refused(case: Case) -> None:
    for name, content in case.files.items():
        for place in range(0, len(content), max(1, len(content) // 20)):
            case.write(name, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            case.unmerge()
        case.write(name, content)


FEW = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=2500)


def _spoiled_record(case: Case, change: Any, forged: bool) -> None:
    content = spoiled(case.files[RECORD], change)
    try:
        document = json.loads(content) if forged else None
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict):
        forge(case, document)
    else:
        case.write(RECORD, content)
    case.unmerge(forged=forged)
    case.restore()


@FEW
@given(changes, st.booleans())
def test_a_spoiled_record(case: Case, change: Any, forged: bool) -> None:
    _spoiled_record(case, change, forged)


@pytest.mark.slow
@MANY
@given(changes, st.booleans())
def test_many_spoiled_records(case: Case, change: Any, forged: bool) -> None:
    _spoiled_record(case, change, forged)


numbers = st.sampled_from([-(2**63), -(10**11), -128, -1, 0, 1, 2, 3, 5, 6, 7, 12, 24, 127, 255, 10**6, 10**11, 2**62, 2**63 - 1])
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
dtypes = st.sampled_from([*INTEGERS, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
HOW = "set add drop dtype flat scalar longer shorter rename empty".split()
spoils = st.tuples(st.sampled_from(HOW), st.floats(0, 1, exclude_max=True), numbers, dtypes)


def spoil(tensors: dict[str, Tensor], how: str, place: float, number: int, dtype: torch.dtype) -> None:
    names = sorted(tensors)
    name = names[int(place * len(names))]
    tensor = tensors[name].clone()
    flat = tensor.reshape(-1)
    if how in ("set", "add") and flat.dtype == torch.bool:
        flat.logical_not_()
    elif how in ("set", "add") and len(flat) and not flat.is_floating_point():
        index = int(place * 1e6) % len(flat)
        value = number if how == "set" else int(flat[index]) + number
        bounds = torch.iinfo(flat.dtype)
        flat[index] = min(max(value, bounds.min), bounds.max)
    elif how in ("set", "add") and len(flat):
        flat[int(place * 1e6) % len(flat)] = float(number)
    elif how == "dtype":
        tensor = tensor.to(dtype)
    elif how == "flat":
        tensor = flat
    elif how == "scalar":
        tensor = torch.tensor(number).to(dtype)
    elif how == "longer":
        tensor = torch.cat([tensor, tensor[-1:]]) if tensor.ndim else tensor
    elif how == "shorter":
        tensor = tensor[:-1] if tensor.ndim else tensor
    elif how == "empty":
        tensor = tensor.new_empty((0, *tensor.shape[1:]))
    if how == "rename":
        del tensors[name]
        name = f"{name.partition('#')[0]}#{['gap', 'needed.0.x', 'needed.99.norm', 'blocks', 'x'][number % 5]}"
    if how == "drop":
        del tensors[name]
    else:
        tensors[name] = tensor.contiguous()


def _spoiled_corrections(case: Case, steps: list[tuple[str, float, int, torch.dtype]]) -> None:
    tensors = load_file(case.merged / CORRECTIONS)
    for step in steps:
        if tensors:
            spoil(tensors, *step)
    case.write(CORRECTIONS, save(tensors))
    case.unmerge()
    case.restore()


@FEW
@given(st.lists(spoils, min_size=1, max_size=3))
def test_spoiled_corrections(case: Case, steps: list[tuple[str, float, int, torch.dtype]]) -> None:
    _spoiled_corrections(case, steps)


@pytest.mark.slow
@MANY
@given(st.lists(spoils, min_size=1, max_size=3))
def test_many_spoiled_corrections(case: Case, steps: list[tuple[str, float, int, torch.dtype]]) -> None:
    _spoiled_corrections(case, steps)


NAMES = (
    "config.json tokenizer.json sub/x.txt model.safetensors other.safetensors ../x.safetensors /x.safetensors . a//b.safetensors".split()
)
NAMES += "model.safetensors/x ./model.safetensors MODEL.safetensors torchgraft_merge.json".split()
names = st.sampled_from([*NAMES, "", "x\0.safetensors", "x" * 300 + ".safetensors"])
sections = st.sampled_from(["headers", "original_files", "original_tensors", "sites", "adapters", "merged_tensors"])


@settings(FEW, max_examples=400)
@given(st.lists(st.tuples(sections, names, st.sampled_from(["rename", "copy", "drop", "clear"])), min_size=1, max_size=3), st.booleans())
def test_spoiled_names(case: Case, steps: list[tuple[str, str, str]], forged: bool) -> None:
    record = json.loads(case.files[RECORD])
    for section, name, how in steps:
        entries = record[section]
        if how == "clear":
            entries.clear()
        elif isinstance(entries, dict) and entries:
            key = min(entries)
            value = entries[key] if how == "copy" else entries.pop(key)
            if how != "drop":
                entries[name] = value
    if forged:
        forge(case, record)
    else:
        case.write(RECORD, json.dumps(record).encode())
    for name in record["headers"].keys() & {"config.json", "tokenizer.json", "sub/x.txt", "other.safetensors", "MODEL.safetensors"}:
        case.write(f"{UNDO}/headers/{name}.header", case.files[f"{UNDO}/headers/model.safetensors.header"])
    case.unmerge(forged=forged)
    case.restore()


def test_what_an_attack_wrote_is_refused(case: Case) -> None:
    """Blocks beyond a tensor's end, which wrote over its neighbor; weight files called like other files; a record without files."""
    tensors = load_file(case.merged / CORRECTIONS)
    table, wide = tensors["norm.bias#blocks"], tensors["norm.bias#wide"]
    tensors["norm.bias#blocks"] = torch.cat([table, torch.tensor([[int(table[-1, 0]) + 3, 0, 0, 3]])])
    tensors["norm.bias#wide"] = torch.cat([wide, torch.full((3,), 1 << 20, dtype=wide.dtype)])
    case.write(CORRECTIONS, save(tensors))
    assert "the data of 'norm.bias' is incomplete or wrong" in case.unmerge()
    case.restore()
    record = json.loads(case.files[RECORD])
    forge(case, record | {"headers": {}, "original_tensors": {}})
    assert "names no weight file" in case.unmerge()
    for name in ("config.json", "tokenizer.json", "sub/x.txt", "./model.safetensors"):
        forge(case, record | {"headers": {name: record["headers"]["model.safetensors"]}})
        assert case.unmerge()
    case.write(RECORD, json.dumps(record | {"original_files": {}}).encode())
    assert "it changed after the merge" in case.unmerge()


@pytest.mark.parametrize("rows", [10**11, 2**62])
def test_a_table_of_many_rows_takes_no_memory(case: Case, rows: int) -> None:
    tensors = load_file(case.merged / CORRECTIONS)
    tensors["q_proj.weight#blocks"][-1, 0] = rows
    case.write(CORRECTIONS, save(tensors))
    tracemalloc.start()
    try:
        assert "incomplete or wrong" in case.unmerge()
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
