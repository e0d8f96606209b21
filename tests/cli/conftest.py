"""Models that the commands are run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    models.build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    models.build("bert").save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three equal blocks, a fourth of another width, and no class that transformers knows."""
    shapes = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,), "scale": (), "lm_head.weight": (10, 4)}
    for block, width in enumerate((4, 4, 4, 6)):
        shapes |= {f"model.layers.{block}.self_attn.{name}.weight": (size, 4) for name, size in (("q_proj", width), ("v_proj", 2))}
        shapes |= {f"model.layers.{block}.self_attn.q_proj.bias": (width,), f"model.layers.{block}.input_layernorm.weight": (4,)}
    save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"
