"""A kind of layer for torchgraft: a projection whose weight is stored by heads, (heads, size, in), as in much research code.

    y[…, h, d] = Σᵢ W[h, d, i]·x[…, i]

Every method works on it, because methods see the matrix (heads·size, in).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchgraft as tg
from torchgraft import hookimpl


class HeadwiseLinear(nn.Module):
    """Project (…, in) to (…, heads, size)."""

    def __init__(self, in_features: int, heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, size, in_features) / in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,hdi->...hd", x, self.weight)


class HeadwiseKind(tg.Kind):
    name = "Headwise"

    def module_class(self) -> type[nn.Module]:
        return HeadwiseLinear

    def canonical_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return (prod(shape[:2]), shape[2])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 3

    def to_canonical(self, weight: Tensor) -> Tensor:
        return weight.flatten(0, 1)

    def from_canonical(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.reshape(shape)

    def project_in(self, module: nn.Module, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        return F.linear(self.dropout(module, x.to(a.dtype), dropout), a)

    def project_out(self, module: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, b).unflatten(-1, self._heads(module))

    def broadcast(self, module: nn.Module, vector: Tensor) -> Tensor:
        return vector.view(self._heads(module))

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        return [(HeadwiseLinear(6, 3, 4), torch.randn(5, 6)), (HeadwiseLinear(12, 3, 4), torch.randn(2, 5, 12))]

    def _heads(self, module: Any) -> tuple[int, ...]:
        return tuple(module.weight.shape[:2])


@hookimpl
def layer_kind() -> tg.Kind:
    return HeadwiseKind()
