"""A site: one matched layer, as a method sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchgraft.errors import AttachError
from torchgraft.kinds import Kind, Shape

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """`module` is absent when the site is in a checkpoint that no model was built for; `read` then gives its stored weight."""

    name: str
    kind: Kind
    shape: Shape
    """Of the weight as it is stored."""
    dtype: str
    groups: int = 1
    """Of a grouped convolution."""
    padding_idx: int | None = None
    """Of an Embedding: the row that is not trained."""
    module: nn.Module | None = None
    read: Callable[[], Tensor] | None = None

    @property
    def out_features(self) -> int:
        return self.kind.canonical_shape(self.shape)[0]

    @property
    def in_features(self) -> int:
        return self.kind.canonical_shape(self.shape)[1]

    @property
    def fan_in(self) -> int:
        """How many inputs reach one output at a time: in_features, but 1 for an Embedding."""
        return self.kind.fan_in(self.shape)

    def weight(self) -> Tensor:
        """The frozen weight in canonical form, (out_features, in_features), in float32 (float64 where it is stored so)."""
        return to_canonical(self.kind, self.stored_weight())

    def stored_weight(self) -> Tensor:
        """The frozen weight as it is stored: in the layer's own shape and dtype."""
        if self.module is not None:
            weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
            return weight
        if self.read is None:
            raise AttachError(f"{self.name}: its weight is not at hand here")
        return self.read()

    def project_in(self, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        """A (r, in_features) applied to the layer's input `x`, in A's dtype: for a Linear, (…, in) → (…, r).

        In training, inputs are dropped with probability `dropout` first (for an Embedding: the columns looked up).
        """
        return self.kind.project_in(self._module, x, a, dropout)

    def project_out(self, h: Tensor, b: Tensor) -> Tensor:
        """B (out_features, r) applied to the result of `project_in`: for a Linear, (…, r) → (…, out)."""
        return self.kind.project_out(self._module, h, b)

    @property
    def _module(self) -> nn.Module:
        if self.module is None:
            raise AttachError(f"{self.name}: there is no layer to run, only its weight in a file")
        return self.module


def to_canonical(kind: Kind, stored: Tensor) -> Tensor:
    """`stored` as a matrix (out_features, in_features) in float32, or in float64 if it is stored so."""
    import torch

    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    return kind.to_canonical(stored).to(wide)


def from_canonical(kind: Kind, matrix: Tensor, like: Tensor) -> Tensor:
    """`matrix` in the shape and dtype of the stored weight `like`: the one rounding of a merge."""
    return kind.from_canonical(matrix, tuple(like.shape)).to(like.dtype).contiguous()
