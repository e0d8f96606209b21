"""What PEFT itself reads, trains and computes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import models

# What PEFT says on its own account: none of it is about the adapter's file.
WARNINGS_OF_PEFT = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "`is_gradient_checkpointing` is deprecated",  # it reads a name that transformers has replaced
        "fan_in_fan_out is set to",  # it sees by itself whether a layer is a Conv1D
        "Setting `save_embedding_layers` to `True`",  # it adds the frozen embedding to its file
        "Model has `tie_word_embeddings=True`",  # of merging, which nothing here does
        "LoRA adapter added to ConvNd layer with groups > 1",  # the same
    )
]
FILES = {"adapter_config.json", "adapter_model.safetensors", "torchgraft.json"}
CLOSE = {"rtol": 1e-5, "atol": 5e-5}


def inputs(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 11, (2, 7), generator=generator)
    if family == "plain":
        return {"x": tokens}
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": tokens}
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :4]} if family == "t5" else {})


def build(family: str) -> nn.Module:
    if family != "plain":
        return models.build(family)
    torch.manual_seed(0)
    return models.Plain().eval()


@torch.no_grad()
def run(model: nn.Module, family: str) -> Tensor:
    out = model(**inputs(family))
    return out if isinstance(out, Tensor) else out.logits


def peft_reads(base: nn.Module, directory: Path) -> peft.PeftModel:
    """The adapter as PEFT loads it: each tensor of the file has its place in the model, and the model has no other."""
    model = peft.PeftModel.from_pretrained(base, directory)
    held, written = peft.get_peft_model_state_dict(model, save_embedding_layers=False), load_file(directory / "adapter_model.safetensors")
    assert held.keys() == written.keys()
    assert all(held[name].equal(written[name]) for name in written)
    for module in model.modules():  # Whisper reads the stride of its convolutions, which PEFT's wrappers lack
        if isinstance(getattr(module, "base_layer", None), nn.Conv1d):
            module.stride = module.base_layer.stride
    return model


def peft_trains(base: nn.Module, directory: Path, adapter_name: str = "default", safe: bool = True, **options: Any) -> nn.Module:
    """A PEFT adapter away from its start, and saved."""
    model = peft.get_peft_model(base, peft.LoraConfig(**options), adapter_name=adapter_name).eval()
    models.perturb_([parameter for parameter in model.parameters() if parameter.requires_grad])
    model.save_pretrained(directory, safe_serialization=safe)
    return model


def alone(layer: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(layer=layer())).eval()


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(4, 6, 3),
    "1d, stride and padding, square": lambda: nn.Conv1d(5, 5, 4, stride=3, padding=2),
    "2d": lambda: nn.Conv2d(4, 6, (2, 3), bias=False),
    "2d, stride and padding": lambda: nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(0, 1)),
    "3d, stride and padding": lambda: nn.Conv3d(4, 3, (1, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
}
GROUPED: dict[str, Callable[[], nn.Module]] = {
    "1d, 2 groups": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "2d, 3 groups": lambda: nn.Conv2d(6, 9, (2, 3), stride=(2, 1), padding=1, groups=3),
    "2d, depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
}


def image_for(model: nn.Module) -> Tensor:
    weight = model.layer.weight
    return torch.randn(2, model.layer.in_channels, *(7, 6, 5)[: weight.dim() - 2], generator=torch.Generator().manual_seed(2))
