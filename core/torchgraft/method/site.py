"""A site: one selected layer, as a method sees it."""

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


class EarlierAdapters(Protocol):
    """The active adapters that were attached to a layer before a given adapter."""

    def merged(self, weight: Tensor) -> Tensor:
        """Return the canonical weight with the adapters merged into it."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors of all these adapters."""

    def merged_bias(self, bias: Tensor) -> Tensor:
        """Return the bias with the adapters merged into it."""

    def names(self) -> list[str]:
        """Return the names of the adapters, in order of attachment."""


@dataclass(frozen=True)
class Site:
    """One layer as a method sees it: its weight as a matrix, and ways to apply matrices as the layer itself would.

    `module` is None if the site is in a checkpoint that no model was built for; `read` then returns its stored weight.
    """

    name: str
    kind: Kind
    shape: Shape
    """Shape of the weight as stored."""
    dtype: str
    has_bias: bool = False
    groups: int = 1
    """Number of groups of a convolution."""
    padding_idx: int | None = None
    """Index of the row of an Embedding that is not trained."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """Settings with which the frozen weight is quantized; empty if it is not."""
    module: nn.Module | None = None
    read: Callable[[], Tensor] | None = None
    beneath: EarlierAdapters | None = None
    """The earlier adapters on the layer."""
    _cache: Cache = field(default_factory=Cache, repr=False, compare=False)

    @property
    def out_features(self) -> int:
        return self.kind.canonical_shape(self.shape)[0]

    @property
    def in_features(self) -> int:
        return self.kind.canonical_shape(self.shape)[1]

    @property
    def fan_in(self) -> int:
        """Number of inputs that reach one output at a time: in_features, but 1 for an Embedding."""
        return self.kind.fan_in(self.shape)

    def weight(self, stored: Tensor | None = None) -> Tensor:
        """Return the frozen weight in canonical form, (out_features, in_features), in float32 (float64 if it is stored so).

        Active earlier adapters are merged into it: `base(x)` computes with this weight.

        Args:
            stored: the result of `stored_weight`, if it is available.
        """
        weight = to_canonical(self.kind, self.stored_weight() if stored is None else stored)
        return weight if self.beneath is None else self.beneath.merged(weight)

    def weight_blocks(self, stored: Tensor | None = None) -> Iterator[Tensor]:
        """Return `weight` in blocks of rows. A 16-bit weight is widened block by block, so that memory never holds all of it in 32 bits.

        Args:
            stored: the result of `stored_weight`, if it is available.
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
        """Return the tensors that `weight` depends on, for `cached`."""
        weight: Tensor = self._module.weight  # type: ignore[assignment]
        return [weight, *(self.beneath.tensors() if self.beneath is not None else ())]

    def stored_weight(self) -> Tensor:
        """Return the frozen weight as stored, in the layer's own shape and dtype. A quantized weight is dequantized."""
        if self.module is not None:
            return self.kind.weight_of(self.module)
        if self.read is None:
            raise AttachError(f"{self.name}: its weight is not available here: there is neither a module nor a file to read")
        return self.read()

    def weight_for_product(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return the stored weight if the layer dequantizes it for each product and `low_rank` can use this one instead; else None.

        A method that needs the weight in training anyway thus dequantizes it once. This works for 4 bits on a CPU, if `x` has the
        type that the layer computes in, and there is no other adapter between the layer and this one.
        """
        return self.kind.weight_for_product(self._module, x, base)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, (out_features,), if it has one: as in `base(x)`, with earlier adapters merged into it."""
        bias: Tensor | None = getattr(self._module, "bias", None)
        return bias if bias is None or self.beneath is None else self.beneath.merged_bias(bias)

    def broadcast(self, vector: Tensor) -> Tensor:
        """Reshape `vector` (out_features,) so that it broadcasts with the layer's output."""
        return self.kind.broadcast(self._module, vector)

    def cached(self, key: str, inputs: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """Return the result of `compute`, computed again only after one of `inputs` was replaced or changed in place.

        While one of them is trained it is computed each time. Each step of an optimizer counts as a change, because some
        optimizers write without raising torch's version count. A change through `tensor.data` is not noticed: for an adapter's
        tensor until `train` or `eval` is called, for the layer's own weight never.
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
        """Return the layer's input with entries dropped in training. The indices of an Embedding are returned unchanged."""
        return self.kind.dropout(self._module, x, p)

    def project_in(self, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        """Apply A (r, in_features) to the layer's input `x`, in A's dtype: for a Linear, (…, in) → (…, r).

        In training, inputs are dropped with probability `dropout` first (for an Embedding: the columns looked up).
        """
        return self.kind.project_in(self._module, x, a, dropout)

    def project_out(self, h: Tensor, b: Tensor) -> Tensor:
        """Apply B (out_features, r) to the result of `project_in`: for a Linear, (…, r) → (…, out)."""
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
        """Return `base(x)` with scale·B·A added to the layer's weight, and each row of the sum multiplied by `gain` (out_features,).

            h = gain·(W + s·B·A)·x + bias        where base(x) = W·x + bias; in its dtype

        The result is that of `base`, `project_in` and `project_out`, with fewer passes over memory and less saved for backward.

        Args:
            stored: the result of `weight_for_product` for `x` and `base`.
        """
        if gain is None:
            return self.kind.low_rank(self._module, x, base, a, b, scale, dropout, stored=stored)
        bias = self.bias if self.bias is None else self.broadcast(self.bias)
        return self.kind.low_rank(self._module, x, base, a, b, scale, dropout, self.broadcast(gain), bias, stored)

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Run the layer's own operation with `matrix` (out_features, in_features) as its weight, and without its bias.

        For a Linear, (…, in) → (…, out). For a low-rank change, `project_in` and `project_out` are cheaper.
        """
        return self.kind.project(self._module, x, matrix)

    @property
    def _module(self) -> nn.Module:
        if self.module is None:
            raise AttachError(f"{self.name}: there is no layer to run, only its weight in a file")
        return self.module


def to_canonical(kind: Kind, stored: Tensor) -> Tensor:
    """Return `stored` as a matrix (out_features, in_features) in float32, or in float64 if it is stored so."""
    return _widened(kind.to_canonical(stored))


def _widened(tensor: Tensor) -> Tensor:
    import torch

    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def fingerprint_of(site: Site) -> str:
    """Return the fingerprint of a site's weight; for a quantized weight, of the weight it was quantized from, or "" if unknown."""
    from torchgraft.checkpoint.fingerprint import SOURCE, of_tensor  # loads numpy

    if site.module is not None and site.kind.quantized:
        return str(site.module.__dict__.get(SOURCE, ""))
    return of_tensor(site.stored_weight())


def seed_of(seed: int, site: str) -> int:
    """Return a seed for one site, so that it starts with the same values whatever else is selected."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{site}".encode()).digest()[:8], "little") >> 1
