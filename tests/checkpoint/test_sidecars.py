"""The files beside the weights in a merge: whose win, what is left out, and that they come back."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

import torchgraft as tg
from references import tree
from small_checkpoint import Small, make_adapter, merge_one_layer, write_model
from torchgraft.errors import FileFormatError, MergeError
from torchgraft.on_files.check import check


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


def merged_files(tmp_path: Path, base_files: Mapping[str, str], adapter_files: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Merge with these files beside base and adapter, see that unmerging restores the base, and return the files beside the merge."""
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    for folder, files in ((base, base_files), (adapter, adapter_files)):
        (folder / "additional_chat_templates").mkdir()
        write_sidecars(folder, files)
    report = tg.merge_checkpoint(base, adapter, tmp_path / "out")
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    (base / "additional_chat_templates").rmdir() if not any((base / "additional_chat_templates").iterdir()) else None
    assert tree(tmp_path / "back") == tree(base)
    weights = ("config.json", "model.safetensors", "torchgraft_merge.json")
    found = {name: content for name, content in tree(tmp_path / "out").items() if name not in weights and "undo" not in name and content}
    return {name: content.decode() for name, content in found.items() if isinstance(content, bytes)}, report.notes


BASE_TOKENIZER = {"tokenizer.json": "{}", "added_tokens.json": '{"x": 1}', "special_tokens_map.json": "{}", "merges.txt": "a b"}


def test_a_tokenizer_with_another_vocabulary_replaces_the_bases_as_a_whole(tmp_path: Path) -> None:
    own = {"tokenizer.json": '{"model": {"vocab": {"a": 15}}}', "special_tokens_map.json": '{"own": "a"}'}
    files, notes = merged_files(tmp_path, BASE_TOKENIZER | {"chat_template.jinja": "base"}, own)
    assert files == own | {"chat_template.jinja": "base"}
    assert "not copied, because the adapter's files replace this set of the base's: added_tokens.json, merges.txt" in notes


def test_a_tokenizer_with_the_same_vocabulary_keeps_the_bases_other_files(tmp_path: Path) -> None:
    files, _ = merged_files(tmp_path, BASE_TOKENIZER, {"tokenizer.json": "{}", "tokenizer_config.json": "{}"})
    assert files == BASE_TOKENIZER | {"tokenizer_config.json": "{}"}


@pytest.mark.parametrize(
    "own",
    [
        {"chat_template.jinja": "mine", "additional_chat_templates/tool.jinja": "my tools"},
        {"chat_template.jinja": "mine"},
        {"tokenizer_config.json": '{"chat_template": "mine"}'},
    ],
    ids=["with further ones", "without", "in the config"],
)
def test_chat_templates_are_replaced_as_a_whole(own: dict[str, str], tmp_path: Path) -> None:
    base = {"chat_template.json": "{}", "additional_chat_templates/tool.jinja": "base", "additional_chat_templates/rag.jinja": "base"}
    files, _ = merged_files(tmp_path, base | {"tokenizer.json": "{}"}, own)
    assert files == own | {"tokenizer.json": "{}"}


def test_processors_are_replaced_as_a_whole_by_the_file_that_contains_them(tmp_path: Path) -> None:
    base = {"preprocessor_config.json": "{}", "video_preprocessor_config.json": "{}"}
    assert merged_files(tmp_path, base, {"processor_config.json": '{"image": 1}'})[0] == {"processor_config.json": '{"image": 1}'}
    one = merged_files(tmp_path / "one", base, {"preprocessor_config.json": '{"size": 1}'})[0]
    assert one == base | {"preprocessor_config.json": '{"size": 1}'}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 16}}}'),
        ("tokenizer.json", '{"model": {"vocab": [["a", 0]]}, "added_tokens": [{"id": 16, "content": "b"}]}'),
        ("tokenizer.json", json.dumps({"model": {"vocab": [["a", 0.0]] * 17}})),
        ("vocab.json", '{"a": 16}'),
        ("added_tokens.json", '{"a": 16}'),
        ("vocab.txt", "a\n" * 17),
    ],
)
def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(name: str, content: str, tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    write_sidecars(adapter, {name: content})
    with pytest.raises(MergeError, match=rf"{name}: this tokenizer has ids up to 16, and the input embedding has 16 rows"):
        tg.merge_checkpoint(base, adapter, tmp_path / "out")
    write_sidecars(adapter, {name: content.replace("16", "15").replace("a\n" * 17, "a\n" * 16).replace('["a", 0.0], ', "", 1)})
    tg.merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["non_lora_trainables.bin", "value_head.safetensors", "mm_projector.pt", "new_embeddings.safetensors", "x.npz"]
)
def test_other_trained_weights_are_named_and_merged_without_only_if_told(name: str, tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    write_sidecars(adapter, {name: "x", "optimizer.pt": "x", "scheduler.pt": "x", "rng_state_0.pth": "x", "training_args.bin": "x"})
    with pytest.raises(MergeError, match=rf"{name}: trained weights beside the adapter.*--leave-out {name}"):
        tg.merge_checkpoint(base, adapter, tmp_path / "out")
    assert any(name in note for note in check(base, adapter).notes)
    report = tg.merge_checkpoint(base, adapter, tmp_path / "out", leave_out=[name])
    assert f"not merged (--leave-out): {name}" in report.notes
    with pytest.raises(tg.ConfigError, match=r"leave out model\.bin: no such file"):
        tg.merge_checkpoint(base, adapter, tmp_path / "again", leave_out=[name, "model.bin"])
    with pytest.warns(tg.TorchgraftWarning, match=rf"not loaded, other trained weights: {name}"):
        tg.load(Small(torch.float32), adapter)


def test_an_adapter_in_the_bases_directory_stays_behind_as_a_whole_and_comes_back(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", Small())
    make_adapter(tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        shutil.copy(path, base)
    for number, adapter in enumerate((tmp_path / "a", base)):
        report = tg.merge_checkpoint(base, adapter, tmp_path / f"out{number}")
        assert report.left_out == ()
        assert [
            note for note in report.notes if "load this adapter on top" in note and "adapter_model.safetensors, torchgraft.json" in note
        ]
        names = {path.name for path in (tmp_path / f"out{number}").iterdir()}
        assert names == {"config.json", "model.safetensors", "torchgraft_merge.json", "torchgraft_undo"}
        tg.unmerge_checkpoint(tmp_path / f"out{number}", tmp_path / f"back{number}")
        assert tree(tmp_path / f"back{number}") == tree(base)
