"""What a change of one site's shape is, asked for by a method that changes ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchgraft.method.config import Config

if TYPE_CHECKING:
    from torch import Tensor

Carry = Callable[["Tensor", int], "Tensor"]
"""(moment, power) → the moment of the resized parameter. power is 1 for means of gradients, 2 for means of their squares."""


@dataclass(frozen=True)
class Resize:
    """What one site becomes."""

    tensors: Mapping[str, Tensor]
    """All of the site's trained tensors whose shape or basis changes."""
    config: Config
    carry: Mapping[str, Carry]
    """For each of `tensors`, how its moments follow."""
