"""Every SHA-256 of the project: of bytes, of a file, of a tensor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def sha256_of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensor(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes in row-major order."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; without a copy if it lies so on the CPU."""
    import torch

    return row_major(tensor).view(torch.uint8).numpy().reshape(-1).data if tensor.numel() else memoryview(b"")


def row_major(tensor: Tensor) -> Tensor:
    """On the CPU and in row-major order. Each call of torch hands the interpreter to another thread, so none is made in vain."""
    if tensor.requires_grad or tensor.device.type != "cpu" or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.ndim else tensor.reshape(1)
