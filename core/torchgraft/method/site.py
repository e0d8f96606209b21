"""A site: one matched layer, as a method sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torchgraft.errors import AttachError
from torchgraft.kinds.kind import Kind, Shape
from torchgraft.method.cache import Cache

if TYPE_CHECKING:
    from torch import Tensor, nn


class Beneath(Protocol):
    """The active adapters between a layer and the adapter that looks at it."""

    def merged(self, weight: Tensor) -> Tensor:
        """The canonical weight with them in it."""

    def tensors(self) -> list[Tensor]:
        """All of theirs."""

    def merged_bias(self, bias: Tensor) -> Tensor:
        """The bias with them in it."""

    def names(self) -> list[str]:
        """Of the adapters, in their order."""


@dataclass(frozen=True)
class Site:
    """One layer as a method sees it: its weight as a matrix, and ways to apply matrices as the layer itself would.

    `module` is absent when the site is in a checkpoint that no model was built for; `read` then gives its stored weight.
    """

    name: str
    kind: Kind
    shape: Shape
    """Of the weight as it is stored."""
    dtype: str
    has_bias: bool = False
    groups: int = 1
    """Of a grouped convolution."""
    padding_idx: int | None = None
    """Of an Embedding: the row that is not trained."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """How the frozen weight is quantised; empty if it is not."""
    module: nn.Module | None = None
    read: Callable[[], Tensor] | None = None
    beneath: Beneath | None = None
    """The adapters that were attached to the layer before."""
    _cache: Cache = field(default_factory=Cache, repr=False, compare=False)

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

    def weight(self, stored: Tensor | None = None) -> Tensor:
        """The frozen weight in canonical form, (out_features, in_features), in float32 (float64 where it is stored so).

        With the adapters in it that were attached to the layer before and are active: it is what `base(x)` computes with.

        Args:
            stored: what `stored_weight` gave, if it is at hand.
        """
        weight = to_canonical(self.kind, self.stored_weight() if stored is None else stored)
        return weight if self.beneath is None else self.beneath.merged(weight)

    def weight_blocks(self, stored: Tensor | None = None) -> Iterator[Tensor]:
        """`weight` in blocks of rows. One in 16 bits is widened block by block, so that it is never there as a whole in 32.

        Args:
            stored: what `stored_weight` gave, if it is at hand.
        """
        from torchgraft.kinds.blocks import row_blocks

        stored = self.stored_weight() if stored is None else stored
        matrix = self.kind.to_canonical(stored)
        if (self.beneath is not None and self.beneath.names()) or matrix.element_size() > 2:
            yield self.weight(stored)
            return
        for rows in row_blocks(len(matrix), matrix.shape[1], matrix.device):
            yield _widened(matrix[rows])

    def weight_tensors(self) -> list[Tensor]:
        """The tensors that `weight` depends on, for `cached`."""
        weight: Tensor = self._module.weight  # type: ignore[assignment]
        return [weight, *(self.beneath.tensors() if self.beneath is not None else ())]

    def stored_weight(self) -> Tensor:
        """The frozen weight as it is stored: in the layer's own shape and dtype. A quantised one is dequantised."""
        if self.module is not None:
            return self.kind.weight_of(self.module)
        if self.read is None:
            raise AttachError(f"{self.name}: its weight is not at hand here")
        return self.read()

    def weight_for_product(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The stored weight of a layer that dequantises it for each product, if `low_rank` takes it instead; else None.

        For a method that needs the weight in training anyway: it is then dequantised once. So it is for 4 bits on a CPU, where
        `x` is of the type that the layer computes in, and nothing lies between the layer and the adapter.
        """
        return self.kind.weight_for_product(self._module, x, base)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, (out_features,), if it has one: as in `base(x)`, with the adapters in it that were attached before."""
        bias: Tensor | None = getattr(self._module, "bias", None)
        return bias if bias is None or self.beneath is None else self.beneath.merged_bias(bias)

    def broadcast(self, vector: Tensor) -> Tensor:
        """`vector` (out_features,) shaped so that it goes along with the layer's output."""
        return self.kind.broadcast(self._module, vector)

    def cached(self, key: str, inputs: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, computed anew only after one of `inputs` was replaced or changed in place.

        While one of them is trained it is computed anew each time, and each step of an optimizer counts as a change: some write
        past torch's own count. A change through `tensor.data` by hand goes unseen: of an adapter's until `train` or `eval` is called,
        and of the layer's own weight altogether.
        """
        return self._cache.get(key, inputs, compute)

    @property
    def memo(self) -> dict[str, Any]:
        """The values that `cached` stores, by key. They are neither copied nor pickled with the site."""
        return self._cache.values

    def forget_adapters(self) -> None:
        """Drop the values that `cached` stores, except those that depend on the layer's own weight alone."""
        if self.memo:
            self._cache.keep_only(self._module.weight)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": Cache()}

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """The layer's input with entries dropped, in training. Indices cannot be: an Embedding's are returned as they are."""
        return self.kind.dropout(self._module, x, p)

    def project_in(self, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        """A (r, in_features) applied to the layer's input `x`, in A's dtype: for a Linear, (…, in) → (…, r).

        In training, inputs are dropped with probability `dropout` first (for an Embedding: the columns looked up).
        """
        return self.kind.project_in(self._module, x, a, dropout)

    def project_out(self, h: Tensor, b: Tensor) -> Tensor:
        """B (out_features, r) applied to the result of `project_in`: for a Linear, (…, r) → (…, out)."""
        return self.kind.project_out(self._module, h, b)

    def low_rank(
        self,
        x: Tensor,
        base: Callable[[Tensor], Tensor],
        a: Tensor,
        b: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
        gain: Tensor | None = None,
        stored: Tensor | None = None,
    ) -> Tensor:
        """`base(x)` with scale·B·A added to the layer's weight, and each row of that times `gain` (out_features,).

            h = gain·(W + s·B·A)·x + bias        where base(x) = W·x + bias; in its dtype

        The same as by `base`, `project_in` and `project_out`, but with fewer passes over memory and less kept for backward.

        Args:
            stored: what `weight_for_product` gave for `x` and `base`.
        """
        if gain is None:
            return self.kind.low_rank(self._module, x, base, a, b, scale, dropout, stored=stored)
        bias = self.bias if self.bias is None else self.broadcast(self.bias)
        return self.kind.low_rank(self._module, x, base, a, b, scale, dropout, self.broadcast(gain), bias, stored)

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The layer's own operation with `matrix` (out_features, in_features) for its weight, and without its bias.

        For a Linear, (…, in) → (…, out). A low-rank change is cheaper by `project_in` and `project_out`.
        """
        return self.kind.project(self._module, x, matrix)

    @property
    def _module(self) -> nn.Module:
        if self.module is None:
            raise AttachError(f"{self.name}: there is no layer to run, only its weight in a file")
        return self.module


def to_canonical(kind: Kind, stored: Tensor) -> Tensor:
    """`stored` as a matrix (out_features, in_features) in float32, or in float64 if it is stored so."""
    return _widened(kind.to_canonical(stored))


def _widened(tensor: Tensor) -> Tensor:
    import torch

    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def fingerprint_of(site: Site) -> str:
    """The fingerprint of a site's weight; of a quantised one, that of the weight it was quantised from, if that is known."""
    from torchgraft.checkpoint.fingerprint import SOURCE, of_tensor  # loads numpy

    if site.module is not None and site.kind.quantized:
        return str(site.module.__dict__.get(SOURCE, ""))
    return of_tensor(site.stored_weight())


def seed_of(seed: int, site: str) -> int:
    """One seed per site, so that a site starts the same whatever else is selected."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{site}".encode()).digest()[:8], "little") >> 1
