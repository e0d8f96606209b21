"""Unmerging of files: with the undo record, with the base, and with a record that was changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import torchgraft as tg
from references import all_tensors, tree
from small_checkpoint import Small, make_adapter, write_model
from torchgraft.errors import MergeError, TorchgraftError
from torchgraft.rewriting import file_tensors
from torchgraft.rewriting.workers import StoppedError, Workers


def test_the_base_gives_the_originals_back_without_an_undo_record(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small(), shards=2), make_adapter(tmp_path / "a")
    (base / "tokenizer.json").write_text("{}")
    tg.merge_checkpoint(base, adapter, tmp_path / "out", undo=False)
    with pytest.raises(MergeError, match="--base DIR"):
        tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    report = tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back", base=base)
    assert (report.from_base, report.restored_tensors, report.copied_tensors) == (True, 0, 7)
    assert tree(tmp_path / "back") == tree(base)
    other = Small()
    with torch.no_grad():
        other.embed_tokens.weight[0, 0] += 1
    for folder, match in (
        (write_model(tmp_path / "other", other, shards=2), r"embed_tokens\.weight is not the tensor that was merged into"),
        (write_model(tmp_path / "cut", Small()), "headers"),
    ):
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(MergeError, match=match):
            tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "again", base=folder)
        assert not (tmp_path / "again").exists()


def test_arithmetic_that_differs_from_the_merge_s_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    tg.merge_checkpoint(base, adapter, tmp_path / "out")
    from torchgraft.arithmetic.layer_merge import LayerMerge

    right = LayerMerge.unmerge
    monkeypatch.setattr(LayerMerge, "unmerge", lambda self, *given, **named: right(self, *given, **named) * 1.01)
    with pytest.raises(MergeError, match=r"proj\.weight: unmerging does not restore the original bits.*the arithmetic here differs"):
        tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_base_in_a_cache_of_links_gives_the_originals_back(tmp_path: Path) -> None:
    real, adapter = write_model(tmp_path / "blobs", Small()), make_adapter(tmp_path / "a")
    base = tmp_path / "snapshots" / "main"
    base.mkdir(parents=True)
    for path in real.iterdir():
        (base / path.name).symlink_to(f"../../blobs/{path.name}")
    tg.merge_checkpoint(base, adapter, tmp_path / "out")
    for number, options in enumerate([{}, {"base": base}]):
        tg.unmerge_checkpoint(tmp_path / "out", tmp_path / f"back{number}", **options)
        assert tree(tmp_path / f"back{number}") == tree(real)


@pytest.mark.parametrize("change", ["spoil", "remove"])
@pytest.mark.parametrize("name", ["torchgraft_merge.json", "torchgraft_undo/corrections.safetensors"])
def test_the_record_of_an_earlier_merge_is_given_back_with_proof(tmp_path: Path, name: str, change: str) -> None:
    base = write_model(tmp_path / "base", Small())
    tg.merge_checkpoint(base, make_adapter(tmp_path / "a"), tmp_path / "once")
    model = Small(torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in all_tensors(tmp_path / "once").items()})
    tg.merge_checkpoint(tmp_path / "once", make_adapter(tmp_path / "b", seed=1, model=model), tmp_path / "twice")
    tg.unmerge_checkpoint(tmp_path / "twice", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "once")
    path = tmp_path / "twice" / "torchgraft_undo" / "base" / name
    if change == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(MergeError, match=f"{name}"):
        tg.unmerge_checkpoint(tmp_path / "twice", tmp_path / "again")


def test_three_merges_come_off_one_after_the_other(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / "0", Small())]
    for number, method in enumerate(["lora", "dora", "lora"], 1):
        model = Small(torch.float32)
        model.load_state_dict({name: tensor.float() for name, tensor in all_tensors(folders[-1]).items()})
        folders.append(tmp_path / f"{number}")
        tg.merge_checkpoint(folders[-2], make_adapter(tmp_path / f"a{number}", method, number, model=model), folders[-1])
    merged = folders[-1]
    for number in (2, 1, 0):
        tg.unmerge_checkpoint(merged, tmp_path / f"back{number}")
        merged = tmp_path / f"back{number}"
        assert tree(merged) == tree(folders[number])


def test_unmerging_proves_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    tg.merge_checkpoint(base, adapter, tmp_path / "out")
    right = file_tensors.write_exactly
    monkeypatch.setattr(file_tensors, "write_exactly", lambda target, data, offset: right(target, memoryview(bytes(data)[::-1]), offset))
    with pytest.raises(MergeError, match="does not restore the original bits"):
        tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")


Spoil = Callable[[Path], None]


def spoil(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "torchgraft_merge.json"
    path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize(
    "change",
    [
        lambda out: spoil(out, b'"config.json"', b'"../../a/torchgraft.json"'),
        lambda out: spoil(out, b'"original_files": {', b'"original_files": {"/etc/hostname": "00",'),
        lambda out: (out / "torchgraft_undo" / "corrections.safetensors").write_bytes(b""),
        lambda out: (out / "torchgraft_undo" / "adapters" / "0" / "adapter_model.safetensors").unlink(),
    ],
)
def test_a_record_that_was_tampered_with_writes_nothing_elsewhere(tmp_path: Path, change: Spoil) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a", "dora")
    tg.merge_checkpoint(base, adapter, tmp_path / "out")
    change(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(TorchgraftError):
        tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "deep" / "back")
    assert tree(tmp_path) == before


def test_a_hash_that_another_workers_failure_stopped_is_not_taken_for_a_wrong_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(8))
    workers = Workers()
    with (tmp_path / "file").open("rb") as file:
        assert workers.digest(file.fileno(), 0, 8, "x") == hashlib.sha256(bytes(8)).hexdigest()
        workers._stop.set()
        with pytest.raises(StoppedError):
            workers.digest(file.fileno(), 0, 8, "x")
