"""Adapters whose names differ from those of their base: saved, written by hand, and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import models
import torchgraft as tg
from architectures import OTHERS
from command import Adapt

FAMILIES = models.FAMILIES | OTHERS


TARGETS = {
    "llama": ["q_proj", "*.1.mlp.*"],
    "bert": ["query", "dense"],
    "gpt2": ["c_attn", "c_proj"],
    "vit": ["q_proj", "fc1"],
    "whisper": ["fc1"],
}


forms = pytest.mark.parametrize("form", ["ours", "peft"])


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def save(adapter: tg.Adapter, directory: Path, form: str = "ours") -> Path:
    models.perturb_(adapter.parameters())
    adapter.save(directory)
    if form == "peft":
        (directory / "torchgraft.json").unlink()
    return directory


def made(model: nn.Module, targets: list[str], directory: Path, form: str = "ours", **options: Any) -> Path:
    return save(tg.apply(model, "lora", targets, rank=2, **options), directory, form)


def written(tensors: Mapping[str, Tensor], directory: Path, **config: Any) -> Path:
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def matrices(*names: str, rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(names))
    return {f"{name}.weight": torch.randn(rows, 6, generator=generator) for name in names}


def handmade(directory: Path, *sites: str, rows: int = 6) -> Path:
    """An adapter as PEFT writes it, on layers with those names."""
    directory.mkdir()
    shapes = {"lora_A.weight": (2, 6), "lora_B.weight": (rows, 2)}
    tensors = {f"base_model.model.{site}.{suffix}": torch.ones(shape) for site in sites for suffix, shape in shapes.items()}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "|".join(map(re.escape, sites))}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def refused(base: Path, adapter: Path, adapt: Adapt) -> list[str]:
    result = adapt("check", base, adapter, "--json")
    assert result.code == 2
    with pytest.raises(tg.TorchgraftError):
        tg.merge_checkpoint(base, adapter, adapter.parent / "never")
    problems: list[str] = json.loads(result.out)["problems"]
    return problems
