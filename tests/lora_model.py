"""LoRA on a small model in float64, and the same model with every update written out."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import torchgraft as tg
from models import Plain, perturb_

RANK, ALPHA = 3, 5.0
LOW_RANK = {"rank": RANK, "alpha": ALPHA, "dtype": "float64"}
TOKENS = torch.tensor([[1, 5, 2, 9], [0, 3, 10, 7]])


def plain(seed: int = 0) -> Plain:
    torch.manual_seed(seed)
    return Plain().double().eval()


def put(model: nn.Module, name: str = "default", targets: Any = ("@all",), seed: int = 1, **options: Any) -> tg.Adapter:
    adapter = tg.apply(model, "lora", targets, name=name, **{**LOW_RANK, **options})
    perturb_(adapter.parameters(), seed=seed)
    return adapter


def dense(base: nn.Module, *adapters: tg.Adapter) -> nn.Module:
    """Return a copy of `base` with every W + α/r·B·A written out in float64, and the trained modules in place of the original ones."""
    copy = deepcopy(base).double().requires_grad_(False)
    for adapter in adapters:
        for name, part in adapter.parts.items():
            weight = copy.get_submodule(name).weight
            a, b = (part.tensors()[key].detach().double() for key in "AB")
            delta = part.config.alpha / part.config.rank * (b @ a)
            weight += (delta.t() if isinstance(copy.get_submodule(name), nn.Embedding) else delta).reshape(weight.shape)
        for name, trained in adapter.copies.items():
            copy.get_submodule(name).load_state_dict(trained.module.state_dict())
    return copy


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(TOKENS)
