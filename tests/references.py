"""Copies of bits, states and files that tests of several folders compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import torchgraft as tg
from torchgraft.testing.forwarding import COMPILES

UNTRIED: set[str] = {"compile"} if TorchVersion(torch.__version__) < COMPILES else set()
"""Checks of the conformance kit that this version of torch cannot pass."""
compiles = pytest.mark.skipif(TorchVersion(torch.__version__) < COMPILES, reason=f"torch.compile needs torch {COMPILES} or newer")

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of an entry in bytes → an integer dtype of that size."""


def tree(folder: Path) -> dict[str, object]:
    """Return every file, directory and link below `folder`, hidden ones too: name → its bytes, None, or the link's target."""
    return {
        path.relative_to(folder).as_posix(): path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all safetensors files in `folder`."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def bits(tensor: Tensor) -> Tensor:
    """Return a copy of the tensor as integers, because NaN is not equal to itself and -0.0 is equal to 0.0."""
    return tensor.detach().contiguous().view(BITS[tensor.element_size()]).clone()


def all_bits(model: nn.Module) -> dict[str, Tensor]:
    """Return the bits of every tensor in the state dict."""
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = all_bits(model)
    assert [name for name in before if not torch.equal(now[name], before[name])] == []


def refused(action: Callable[[], Any], model: nn.Module, match: str, *errors: type[Exception]) -> None:
    """Assert that `action` raises and changes no bit of the model, base or adapter."""
    before = all_bits(model)
    with pytest.raises(errors or tg.MergeError, match=match):
        action()
    assert_same_bits(model, before)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Assert that two state dicts have the same names in the same order, and equal values."""
    assert list(one) == list(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
