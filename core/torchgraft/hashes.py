"""SHA-256 of bytes, of a file and of a tensor: every hash of the project."""

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
    """Return the SHA-256 of the tensor's bytes in row-major order."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the tensor's bytes in row-major order, without a copy if it is contiguous and on the CPU."""
    import torch

    return row_major(tensor).view(torch.uint8).numpy().reshape(-1).data if tensor.numel() else memoryview(b"")


def row_major(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU and contiguous. It calls torch only where needed, because each call may switch threads."""
    if tensor.requires_grad or tensor.device.type != "cpu" or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.ndim else tensor.reshape(1)
