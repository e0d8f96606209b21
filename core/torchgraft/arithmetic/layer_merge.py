"""The arithmetic of a merge into one layer, in float64, by blocks of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchgraft.arithmetic.precision import widened
from torchgraft.errors import MergeError
from torchgraft.plugin.method_hooks import MethodHooks

SAMPLE = 8
"""Rows with which `is_zero` begins."""


@dataclass(frozen=True)
class Applied:
    """One adapter on one layer, for a merge."""

    hooks: MethodHooks
    config: Any
    params: Mapping[str, Tensor]
    factor: float = 1.0
    """Factor of the adapter's change. Other factors than 1 are possible with additive methods only."""


class MergedRows(NamedTuple):
    """A block of merged rows, and what unmerging it needs."""

    weight: Tensor
    change: Tensor | None = None
    """Σ f·ΔW, if all methods are additive. To unmerge right away, pass it to `unmerge`, which would compute it again."""
    needed: Sequence[Mapping[str, Tensor]] = ()
    """For each adapter, the tensors that its hook adapter_undo returned; empty if all methods are additive."""


class UndoTensors:
    """Collects the tensors that the hook adapter_undo returns for blocks of rows.

    Args:
        adapters: number of adapters.
        rows: out_features; None if the hooks are called once, for all rows.
    """

    def __init__(self, adapters: int, rows: int | None = None) -> None:
        self.tensors: list[dict[str, Tensor]] = [{} for _ in range(adapters)]
        """For each adapter, its tensors for all rows."""
        self._rows = rows

    def add(self, rows: slice, needed: Sequence[Mapping[str, Tensor]]) -> None:
        """Add `MergedRows.needed` of one block of rows."""
        for number, found in enumerate(needed):
            own = self.tensors[number]
            for name, tensor in found.items():
                if self._rows is None:
                    own[name] = tensor
                    continue
                if name not in own:
                    own[name] = tensor.new_zeros(self._rows, *tensor.shape[1:])
                own[name][rows] = tensor


class LayerMerge:
    """The adapters that are merged into one layer, in order.

    The changes of additive methods are summed up, and the sum is added once: W + Σ f·ΔW. If one of them is not additive,
    each is merged into the result of the one before.
    """

    def __init__(self, applied: Sequence[Applied], device: torch.device | None = None) -> None:
        self._applied = [(one, widened(one.params, torch.float64, device)) for one in applied]
        self.additive = all(one.hooks.method.additive for one in applied)
        self.by_rows = all(one.hooks.merges_rows for one in applied)

    def merge(self, weight: Tensor, rows: slice) -> MergedRows:
        """Merge into `weight`, the canonical rows `rows`, in float64."""
        weight = weight.to(torch.float64, copy=True)
        if self.additive:
            change = self._change(weight, rows)
            return MergedRows(weight.add_(change), change)
        needed: list[Mapping[str, Tensor]] = []
        for one, params in self._applied:
            if one.hooks.method.additive:
                weight = weight + _change_of(one, params, weight, rows)
                needed.append({})
            else:
                needed.append(one.hooks.undo(one.config, params, weight, rows))
                weight = one.hooks.merge(one.config, params, weight, rows)
        return MergedRows(weight, needed=needed)

    def unmerge(
        self, merged: Tensor, rows: slice, dtype: torch.dtype, needed: Sequence[Mapping[str, Tensor]], change: Tensor | None = None
    ) -> Tensor:
        """Return the original rows up to rounding, which a correction undoes.

        Args:
            dtype: the type to compute in.
            needed: for each adapter, the tensors that its hook adapter_undo returned, for all rows.
            change: `MergedRows.change`, if it is available.
        """
        weight = merged.to(dtype, copy=True)
        if self.additive:
            return weight.sub_((self._change(weight, rows) if change is None else change).to(dtype))
        for (one, params), own in reversed(list(zip(self._applied, needed, strict=True))):
            if one.hooks.method.additive:
                weight = weight - _change_of(one, params, weight, rows)
            else:
                weight = one.hooks.unmerge(one.config, {**params, **own}, weight, rows)
        return weight

    def _change(self, weight: Tensor, rows: slice) -> Tensor:
        """Return Σ f·ΔW."""
        changes = [_change_of(one, params, weight, rows) for one, params in self._applied]
        return sum(changes[1:], changes[0])


def _change_of(one: Applied, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    """Return f·ΔW of an additive method: the result of merging into zeros of the shape of `weight`."""
    zeros = weight.new_zeros((), dtype=torch.float64).expand_as(weight)
    change = one.hooks.merge(one.config, params, zeros, rows)
    return change if one.factor == 1 else one.factor * change


@torch.no_grad()
def is_zero(one: Applied, shape: tuple[int, int]) -> bool:
    """Whether the change ΔW of an additive method is zero. Few rows decide, unless they are zero.

    Args:
        shape: (out_features, in_features).
    """
    params = widened(one.params, torch.float32)
    ends = (min(SAMPLE, shape[0]), shape[0]) if one.hooks.merges_rows else (shape[0],)
    return not any(
        one.hooks.merge(one.config, params, torch.zeros(()).expand(end, shape[1]), slice(0, end)).count_nonzero() for end in ends
    )


def check_no_bias(name: str, one: Applied, rows: int) -> None:
    """Check that an adapter on a layer without a bias would not add one.

    Raises:
        MergeError: the adapter would add a bias.
    """
    if one.hooks.merges_bias and _biased(one, torch.zeros(rows, dtype=torch.float64)).count_nonzero():
        raise MergeError(f"{name}: {one.hooks.method.name} adds to the layer's bias, and the layer has none to merge into")


def changes_bias(one: Applied, rows: int) -> bool:
    """Whether the adapter changes a bias: with some options a method may not change it."""
    bias = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return one.hooks.merges_bias and not _biased(one, bias.clone()).equal(bias)


@torch.no_grad()
def _biased(one: Applied, bias: Tensor) -> Tensor:
    return one.hooks.merge_bias(one.config, widened(one.params, bias.dtype, bias.device), bias)
