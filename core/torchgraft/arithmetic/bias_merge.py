"""Merge into a layer's bias. It is small, so it is merged as a whole, and its original is stored as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchgraft.arithmetic.layer_merge import Applied, MergedRows, UndoTensors
from torchgraft.arithmetic.precision import check_finite, exactly, tolerance, widened


class BiasMerge:
    """The merge of adapters into one bias, with the interface of `TensorMerge`.

    Args:
        stored: its dtype in the base.
        written: its dtype in the merge.
    """

    kind = None
    by_rows = False

    def __init__(self, name: str, stored: torch.dtype, written: torch.dtype, applied: Sequence[Applied]) -> None:
        self._name, self._stored, self._written, self._applied = name, stored, written, applied

    def undo_tensors(self) -> UndoTensors:
        """Return empty `UndoTensors`, because unmerging a bias needs no tensors of the method's hook adapter_undo."""
        return UndoTensors(0)

    def merged(self, original: Tensor, rows: slice) -> MergedRows:
        """Return the merged bias in the type of the merge.

        Raises:
            MergeError: an entry that was finite would become NaN or infinite.
        """
        result = self._sum(original).to(self._written)
        check_finite(self._name, result, original, [one.params for one in self._applied])
        return MergedRows(result)

    def nearly(self, merged: Tensor, rows: slice, needed: Sequence[Mapping[str, Tensor]], change: Tensor | None = None) -> Tensor:
        """Return the merged bias itself, because the correction stores the whole difference."""
        return merged.to(self._stored)

    def expected(self, original: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the merged bias in float64, and the tolerance of each entry."""
        result = self._sum(original)
        return result, tolerance(self._written, result, original.double())

    @torch.no_grad()
    def _sum(self, original: Tensor) -> Tensor:
        """Merge one adapter after the other, in float64. The change of an additive adapter is the result of merging into zeros."""
        result = original.reshape(-1).double()
        with exactly(result):
            for one in self._applied:
                params = widened(one.params, torch.float64, result.device)
                if one.hooks.method.additive:
                    result = result + one.factor * one.hooks.merge_bias(one.config, params, torch.zeros_like(result))
                else:
                    result = one.hooks.merge_bias(one.config, params, result)
        return result.reshape(original.shape)
