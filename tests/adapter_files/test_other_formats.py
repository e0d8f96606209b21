"""What a user often gives as a model or an adapter, and is neither: each message says what it is and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import torchgraft as tg
from saved_adapters import edit_json
from small_checkpoint import Small, make_adapter, write_model
from torchgraft.checkpoint import hub
from torchgraft.on_files.check import check

FACTOR = torch.zeros(2, 2)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def said(model: Path, adapter: Path | str) -> str:
    return "; ".join(check(model, adapter).problems)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", Small())


@pytest.mark.parametrize("name", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_git_lfs_pointer_is_named(name: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "torchgraft.json").unlink()
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(tg.FileFormatError, match="is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'"):
        tg.merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "tool"),
    [
        ("lora_unet_q_proj.lora_down.weight", "kohya's"),
        ("unet.q_proj.lora.down.weight", "diffusers' former"),
        ("transformer.q_proj.lora_A.weight", "diffusers'"),
        ("model.layers.0.q_proj.lora_a", "mlx-lm's"),
    ],
)
def test_the_format_of_another_tool_is_named(key: str, tool: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    save_file({key: FACTOR}, tmp_path / "lora/weights.safetensors")
    for adapter in (tmp_path / "lora", tmp_path / "lora/weights.safetensors"):
        assert f"weights.safetensors is a LoRA in {tool} format, which is not read: convert it to PEFT's" in said(base, adapter)


def test_mlx_lms_config_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4}}))
    assert "an adapter in mlx-lm's format" in said(base, tmp_path / "lora")


def test_a_directory_without_any_adapter_names_no_tool(base: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    save_file({"a": FACTOR}, tmp_path / "x/a.safetensors")
    (tmp_path / "x/broken.safetensors").write_text("x")
    assert said(base, tmp_path / "x").endswith("not an adapter directory: it contains no adapter_config.json")


@pytest.mark.parametrize("between", ["", ".base_layer"])
def test_an_adapter_file_with_the_whole_model_in_it_is_named(between: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "torchgraft.json").unlink()
    file = adapter / "adapter_model.safetensors"
    whole = {f"base_model.model.{name.replace('.weight', f'{between}.weight')}": each for name, each in Small().state_dict().items()}
    save_file(load_file(file) | whole, file)
    assert "the adapter's file also holds the model itself (7 of the base's own weights" in said(base, adapter)


def test_a_quantized_layer_says_what_it_is(base: Path, tmp_path: Path) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    del tensors["q_proj.weight"]
    save_file(tensors | {"q_proj.qweight": torch.zeros(1, 8, dtype=torch.int32), "q_proj.scales": torch.ones(1, 8)}, file)
    assert "q_proj: is quantized: qweight has the type int32; adapters can only be merged into the model" in said(
        base, plain(make_adapter(tmp_path / "adapter"))
    )


def plain(adapter: Path) -> Path:
    (adapter / "torchgraft.json").unlink()
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "up_proj", "down_proj"])
    return adapter


def test_adapters_and_models_are_found_by_their_hub_ids_and_revisions(monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[tuple[str, Any]] = []
    places = {"me/base": base, "me/lora": make_adapter(tmp_path / "adapter")}

    def download(name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        assert local_files_only
        asked.append((name, revision))
        return str(shutil.copytree(places[name], tmp_path / "cache" / name.replace("/", "-"), dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert said("me/base@v1.0", "me/lora@refs/pr/1") == ""  # type: ignore[arg-type]
    assert said("me/base", Path("me/lora")) == ""  # type: ignore[arg-type]
    assert asked == [("me/base", "v1.0"), ("me/lora", "refs/pr/1"), ("me/base", None), ("me/lora", None)]


@pytest.mark.parametrize(("source", "says"), [("me/lora", "no such hub id"), ("me/lora@v9", "no revision v9 of the hub id me/lora")])
def test_a_hub_id_that_cannot_be_fetched_says_so(source: str, says: str, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert says in said(base, source)
    with pytest.raises(tg.FileFormatError, match=says):
        hub.locate(source)
