"""The arithmetic of a merge: in float64, a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchgraft.arithmetic.precision import widened
from torchgraft.errors import MergeError
from torchgraft.plugin.method_hooks import MethodHooks


@dataclass(frozen=True)
class Applied:
    """One adapter on one layer, for a merge."""

    hooks: MethodHooks
    config: Any
    params: Mapping[str, Tensor]
    factor: float = 1.0
    """What its change is multiplied with. Only an additive method's can be."""


class LayerMerge:
    """The adapters that are merged into one layer, the first of them first.

    The changes of additive methods are summed up, and the sum is added once: W + Σ f·ΔW. If one of them is not additive,
    each is merged into what the one before gave.

    Args:
        rows: out_features.
        needed: for each adapter, what its hook adapter_undo gave when it was merged.
    """

    def __init__(
        self,
        applied: Sequence[Applied],
        rows: int,
        needed: Sequence[dict[str, Tensor]] = (),
        device: torch.device | None = None,
    ) -> None:
        self._applied = applied
        self._params = [widened(one.params, torch.float64, device) for one in applied]
        self._rows = rows
        self.needed = list(needed) or [{} for _ in applied]
        self.additive = all(one.hooks.method.additive for one in applied)
        self.by_rows = all(one.hooks.merges_rows for one in applied)
        self._zeros = torch.empty(0)
        self._last: tuple[slice, Tensor] | None = None

    def merge(self, weight: Tensor, rows: slice) -> Tensor:
        """`weight`, the canonical rows `rows` in float64, with the adapters in it. `weight` is overwritten."""
        if self.additive:
            return weight.add_(self._sum(weight, rows))
        for one, params, needed in zip(self._applied, self._params, self.needed, strict=True):
            if one.hooks.method.additive:
                weight = weight + self._change_of(one, params, weight, rows)
            else:
                self._keep(needed, one.hooks.undo(one.config, params, weight, rows), rows)
                weight = one.hooks.merge(one.config, params, weight, rows)
        return weight

    def unmerge(self, merged: Tensor, rows: slice) -> Tensor:
        """What arithmetic makes of the original rows; a correction puts the rest right. `merged` is overwritten."""
        if self.additive:
            return merged.sub_(self._sum(merged, rows).to(merged.dtype))
        for one, params, needed in reversed(list(zip(self._applied, self._params, self.needed, strict=True))):
            if one.hooks.method.additive:
                merged = merged - self._change_of(one, params, merged, rows)
            else:
                merged = one.hooks.unmerge(one.config, {**params, **needed}, merged, rows)
        return merged

    def _sum(self, weight: Tensor, rows: slice) -> Tensor:
        """Σ f·ΔW. Unmerging right after merging needs the same again."""
        if self._last is None or self._last[0] != rows:
            changes = [self._change_of(one, params, weight, rows) for one, params in zip(self._applied, self._params, strict=True)]
            self._last = rows, sum(changes[1:], changes[0])
        return self._last[1]

    def _change_of(self, one: Applied, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
        """f·ΔW of an additive method: what merging into zeros gives."""
        if self._zeros.shape != weight.shape or self._zeros.device != weight.device:
            self._zeros = weight.new_zeros((), dtype=torch.float64).expand_as(weight)
        change = one.hooks.merge(one.config, params, self._zeros, rows)
        return change if one.factor == 1 else one.factor * change

    def _keep(self, needed: dict[str, Tensor], found: Mapping[str, Tensor], rows: slice) -> None:
        """What one block of rows gave, at its place among all rows'."""
        for name, tensor in found.items():
            if not self.by_rows:
                needed[name] = tensor
                continue
            if name not in needed:
                needed[name] = tensor.new_zeros(self._rows, *tensor.shape[1:])
            needed[name][rows] = tensor


def check_no_bias(name: str, one: Applied, rows: int) -> None:
    """Of a layer that has no bias.

    Raises:
        MergeError: the adapter would give it one.
    """
    if one.hooks.merges_bias and _biased(one, torch.zeros(rows, dtype=torch.float64)).count_nonzero():
        raise MergeError(f"{name}: {one.hooks.method.name} adds to its bias and it has none, so there is nothing to merge into")


def changes_bias(one: Applied, rows: int) -> bool:
    """Whether the adapter changes a bias: with some options a method may leave it alone."""
    bias = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return one.hooks.merges_bias and not _biased(one, bias.clone()).equal(bias)


@torch.no_grad()
def _biased(one: Applied, bias: Tensor) -> Tensor:
    return one.hooks.merge_bias(one.config, widened(one.params, bias.dtype, bias.device), bias)
