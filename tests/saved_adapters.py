"""Change a saved adapter as if it had been written that way, and see that a failed load changes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.adapter_files.peft_config import meaning


def edit_json(path: Path, **values: Any) -> None:
    if path.exists():
        path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the saved tensors, and the hash in the record with them."""
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    (directory / "adapter_model.safetensors").write_bytes(data)
    file = {"file": "adapter_model.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(directory / "torchgraft.json", tensors=file)


def agree(directory: Path) -> None:
    """Record what PEFT's config declares now, as if both had been written together."""
    edit_json(directory / "torchgraft.json", peft_config=meaning(json.loads((directory / "adapter_config.json").read_bytes())))


def rename(directory: Path, old: str, new: str) -> None:
    """Replace `old` by `new` in the names of the tensors and in both JSON files."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    for name in ("adapter_config.json", "torchgraft.json"):
        if (directory / name).exists():
            (directory / name).write_text((directory / name).read_text().replace(old, new))
    agree(directory)
    edit_tensors(directory, change)


def snapshot(model: nn.Module) -> list[object]:
    """Return everything that a failed load could have changed."""
    return [
        {name: (tensor.dtype, tensor.flatten().view(torch.uint8).numpy().tobytes()) for name, tensor in model.state_dict().items()},
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [(name, type(module), module.training, set(module.__dict__)) for name, module in model.named_modules()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        list(tg.adapters(model)),
    ]


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.update({name: change(tensors[name])}))


def drop(*names: str) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, lambda tensors: [tensors.pop(name) for name in names])


def add(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.update({name: torch.ones(shape)}))
