"""The description of a change of one site's tensors, requested by a method that changes ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchgraft.method.config import Config

if TYPE_CHECKING:
    from torch import Tensor

Carry = Callable[["Tensor", int], "Tensor"]
"""(moment, power) → the moment of the resized parameter. The power is 1 for means of gradients, 2 for means of their squares."""


@dataclass(frozen=True)
class Resize:
    """The new tensors and config of one site."""

    tensors: Mapping[str, Tensor]
    """The site's trained tensors whose shape or basis changes, by name."""
    config: Config
    carry: Mapping[str, Carry]
    """For each of `tensors`, the conversion of its moments."""
