"""The memory of this process, and of frozen weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn


def touch(model: nn.Module) -> None:
    """Read every weight: from_pretrained maps the file, and what was never read is not in memory yet."""
    for parameter in model.parameters():
        parameter.detach().view(torch.uint8).max()


def reset_peak() -> None:
    """Let the kernel count this process's peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes in memory since `reset_peak`."""
    return _status("VmHWM")


def resident() -> int:
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def stored_bytes(modules: Iterable[nn.Module]) -> dict[str, int]:
    """Of the layers' weights, without biases: as they lie in memory (codes and scales, if quantised), in 16 and in 32 bits."""
    stored = numbers = 0
    for module in modules:
        weight = module._parameters["weight"]
        assert weight is not None
        state = getattr(weight, "quant_state", None)
        numbers += weight.numel() if state is None else state.shape.numel()
        tensors = [weight] if state is None else [weight, *_scales(state)]
        stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {"stored": stored, "in_16_bits": 2 * numbers, "in_32_bits": 4 * numbers}


def _scales(state: object) -> list[torch.Tensor]:
    """Every tensor of bitsandbytes' state of a quantised weight: scales, their offset, and tables of codes."""
    found = []
    for value in vars(state).values():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif hasattr(value, "absmax"):
            found += _scales(value)
    return found
