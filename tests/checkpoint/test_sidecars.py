"""The files beside the weights in a merge: whose win, what is left out, and that they come back."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

import torchgraft as tg
from references import tree
from small_checkpoint import Small, make_adapter, merge_one_layer, write_model
from torchgraft.errors import FileFormatError, MergeError


def write_sidecars(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def test_the_adapter_s_tokenizer_and_chat_template_win_and_the_base_s_come_back(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    write_sidecars(base, {"tokenizer.json": "{}", "vocab.txt": "a", "chat_template.jinja": "base", "generation_config.json": '{"x": 1}'})
    write_sidecars(
        adapter,
        {"tokenizer.json": '{"own": 1}', "vocab.txt": "a", "chat_template.jinja": "mine", "added_tokens.json": "{}", "README.md": "#"},
    )
    report = tg.merge_checkpoint(base, adapter, tmp_path / "out")
    assert report.notes == ("taken from the adapter, not the base: added_tokens.json, chat_template.jinja, tokenizer.json",)
    found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file() and "safetensors" not in path.name}
    del found["torchgraft_merge.json"], found["config.json"]
    assert found == {
        "tokenizer.json": '{"own": 1}',
        "vocab.txt": "a",
        "chat_template.jinja": "mine",
        "added_tokens.json": "{}",
        "generation_config.json": '{"x": 1}',
    }
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_a_chat_template_in_the_adapter_s_tokenizer_config_is_not_hidden_by_the_base_s_file(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    write_sidecars(base, {"tokenizer_config.json": "{}", "chat_template.jinja": "base"})
    write_sidecars(adapter, {"tokenizer_config.json": '{"chat_template": "mine"}'})
    tg.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_other_merges_and_circles_of_links_in_the_base_are_not_carried(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    (base / "code").mkdir()
    (base / "code" / "model.py").write_text("")
    tg.merge_checkpoint(base, adapter, tmp_path / "first")
    shutil.copytree(tmp_path / "first", base / "out")
    (base / ".out2.x.partial").mkdir()
    (base / ".out2.x.partial" / "model.safetensors").write_text("")
    (base / "code" / "around").symlink_to("..")
    tg.merge_checkpoint(base, adapter, tmp_path / "out")
    names = {name for name in tree(tmp_path / "out") if not name.startswith("torchgraft_undo")}
    assert names == {"code", "code/model.py", "config.json", "model.safetensors", "torchgraft_merge.json"}


@pytest.mark.parametrize("inside", ["base", "a", "first"])
def test_an_output_inside_a_source_is_refused(tmp_path: Path, inside: str) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    tg.merge_checkpoint(base, adapter, tmp_path / "first")
    before = tree(tmp_path)
    out = tmp_path / inside / "deep" / "out"
    call = (
        partial(tg.unmerge_checkpoint, tmp_path / "first", out) if inside == "first" else partial(tg.merge_checkpoint, base, adapter, out)
    )
    with pytest.raises(FileFormatError, match=": inside "):
        call()
    assert tree(tmp_path) == before


def test_files_keep_their_modes(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    (base / "run.sh").write_text("#!/bin/sh")
    (base / "run.sh").chmod(0o755)
    tg.merge_checkpoint(base, adapter, tmp_path / "out")
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert [(tmp_path / name / "run.sh").stat().st_mode & 0o777 for name in ("out", "back")] == [0o755, 0o755]


def test_two_adapters_with_different_tokenizers_are_refused(tmp_path: Path) -> None:
    base, adapters = write_model(tmp_path / "base", Small()), [make_adapter(tmp_path / f"a{seed}", seed=seed) for seed in (0, 1)]
    for number, adapter in enumerate(adapters):
        write_sidecars(adapter, {"tokenizer.json": f'{{"n": {number}}}', "vocab.txt": "a"})
    with pytest.raises(MergeError, match=r"tokenizer\.json: it differs from .*remove the other"):
        tg.merge_checkpoint(base, dict.fromkeys(adapters, 0.5), tmp_path / "out")


def test_an_older_template_in_the_same_config_leaves_the_base_s_file(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    for folder in (base, adapter):
        write_sidecars(folder, {"tokenizer_config.json": '{"chat_template": "older"}'})
    write_sidecars(base, {"chat_template.jinja": "base"})
    assert tg.merge_checkpoint(base, adapter, tmp_path / "out").notes == ()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "base"


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return merge_one_layer(tmp_path)


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
