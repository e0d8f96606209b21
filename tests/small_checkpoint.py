"""A small checkpoint and adapters for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import torchgraft as tg
from models import perturb_

LAYERS = {"q_proj": (8, 8), "up_proj": (24, 8), "down_proj": (8, 24)}


class Small(nn.Module):
    """Square, tall and wide linear layers, an embedding, and a head."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(16, 8)
        self.q_proj, self.up_proj, self.down_proj = (nn.Linear(k, d, bias=False) for d, k in LAYERS.values())
        self.head = nn.Linear(8, 3)
        self.register_buffer("steps", torch.arange(5))
        self.to(dtype)


def write_model(folder: Path, model: nn.Module, shards: int = 1, config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    tensors = model.state_dict()
    names = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"made": "here"}, "weight_map": names}))
    else:
        names = dict.fromkeys(tensors, "model.safetensors")
    for file in set(names.values()):
        save_file({name: tensor for name, tensor in tensors.items() if names[name] == file}, folder / file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "small", "dtype": "bfloat16", **(config or {})}))
    return folder


def make_adapter(folder: Path, method: str = "lora", seed: int = 0, **options: Any) -> Path:
    model = options.pop("model", None) or Small(torch.float32)
    adapter = tg.apply(model, method, options.pop("targets", list(LAYERS)), **options)
    perturb_(adapter.parameters(), seed=seed)
    adapter.save(folder)
    return folder


def merge_one_layer(folder: Path) -> Path:
    """Write a checkpoint of one layer, an adapter for it and their merge into `folder`. Return the merge."""
    save_file({"q_proj.weight": torch.randn(6, 4), "q_proj.bias": torch.zeros(6)}, folder / "model.safetensors")
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 6)})
    model.load_state_dict(load_file(folder / "model.safetensors"))
    adapter = tg.apply(model, "lora", "q_proj", rank=2)
    perturb_(adapter.parameters())
    adapter.save(folder / "adapter")
    tg.merge_checkpoint(folder / "model.safetensors", folder / "adapter", folder / "merged")
    return folder / "merged"
