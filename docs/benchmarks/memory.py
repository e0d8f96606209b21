"""Measure the memory of this process and of frozen weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn


def touch(model: nn.Module) -> None:
    """Read every weight, because from_pretrained maps the file and loads a page when it is first read."""
    for parameter in model.parameters():
        parameter.detach().view(torch.uint8).max()


def reset_peak() -> None:
    """Reset the kernel's record of this process's peak memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the peak memory in bytes since `reset_peak`."""
    return _status("VmHWM")


def resident() -> int:
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def stored_bytes(modules: Iterable[nn.Module]) -> dict[str, int]:
    """Return the bytes of the layers' weights without biases: as stored (codes and scales if quantized), in 16-bit and in 32-bit dtypes."""
    stored = entries = 0
    for module in modules:
        weight = module._parameters["weight"]
        assert weight is not None
        state = getattr(weight, "quant_state", None)
        entries += weight.numel() if state is None else state.shape.numel()
        tensors = [weight] if state is None else [weight, *_scales(state)]
        stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {"stored": stored, "in_16_bits": 2 * entries, "in_32_bits": 4 * entries}


def _scales(state: object) -> list[torch.Tensor]:
    """Return every tensor in bitsandbytes' state of a quantized weight: scales, their offset, and code tables."""
    found = []
    for value in vars(state).values():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif hasattr(value, "absmax"):
            found += _scales(value)
    return found
