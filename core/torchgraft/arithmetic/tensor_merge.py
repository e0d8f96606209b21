"""Merge into one tensor and unmerge it, by blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torchgraft.arithmetic.layer_merge import Applied, LayerMerge, MergedRows, UndoTensors
from torchgraft.arithmetic.precision import check_finite, exactly, replacement, tolerance
from torchgraft.kinds.blocks import MemoryBlocks
from torchgraft.kinds.kind import Kind, Shape


class TensorMerge:
    """The merge of adapters into one tensor.

    Args:
        stored: its dtype in the base.
        written: its dtype in the merge.
        kind: kind of the layer whose weight it is; None if nothing is merged into it.
        applied: the adapters that are merged into it.
        trained: an adapter's tensor that replaces it.
        start: the weight to merge into, canonical, if it is not the base's own weight.
    """

    def __init__(
        self,
        name: str,
        shape: Shape,
        stored: torch.dtype,
        written: torch.dtype,
        kind: Kind | None = None,
        applied: Sequence[Applied] = (),
        *,
        trained: Tensor | None = None,
        start: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.name, self.kind, self._stored, self._written = name, kind, stored, written
        self._trained = None if trained is None else replacement(name, trained, shape, written).reshape(-1, 1)
        self._start, self._applied = start, applied
        # A correction follows, so unmerging needs no more precision than the restored type.
        coarse = stored.itemsize == 2 and all(one.hooks.method.additive for one in applied)
        self._back = torch.float32 if coarse else torch.float64
        self._layer = LayerMerge(applied, device) if applied and kind else None
        self._rows = kind.canonical_shape(shape)[0] if kind else 0

    @property
    def by_rows(self) -> bool:
        """Whether the merge can work on blocks of rows."""
        return self._layer is None or self._layer.by_rows

    def undo_tensors(self) -> UndoTensors:
        """Return the collector for `MergedRows.needed`."""
        return UndoTensors(len(self._applied), self._rows if self.by_rows else None)

    def merged(self, original: Tensor, rows: slice) -> MergedRows:
        """Return the merged rows in the type of the merge.

        Raises:
            MergeError: an entry that was finite would become NaN or infinite.
        """
        if self._trained is not None:
            return MergedRows(self._trained[rows])
        weight = original if self._start is None else self._start[rows]
        result = self._layer.merge(weight, rows) if self._layer is not None else MergedRows(weight.to(torch.float64))
        written = result.weight.to(self._written)
        check_finite(self.name, written, original, [one.params for one in self._applied])
        return result._replace(weight=written)

    def nearly(self, merged: Tensor, rows: slice, needed: Sequence[Mapping[str, Tensor]], change: Tensor | None = None) -> Tensor:
        """Return the base's rows up to rounding, which a correction undoes.

        Args:
            needed: `UndoTensors.tensors`.
            change: `MergedRows.change`, if it is available.
        """
        weight = self._layer.unmerge(merged, rows, self._back, needed, change) if self._layer is not None else merged.to(self._back)
        return weight.to(self._stored)

    def expected(self, original: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the merged rows by the method's own formula in float64, and the tolerance of each entry."""
        if self._trained is not None:
            return self._trained[rows].double(), torch.zeros(1)
        weight = original.double() if self._start is None else self._start[rows].double()
        result = reference(self._applied, weight, rows)
        return result, tolerance(self._written, result, weight)


@torch.no_grad()
def merge_tensor(name: str, kind: Kind, applied: Applied, stored: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a new tensor, `stored` with one adapter merged into it, and the tensors that unmerging will need.

    Raises:
        MergeError: an entry that was finite would become NaN or infinite.
    """
    merge = _in_memory(name, kind, applied, stored)
    undo = merge.undo_tensors()

    def change(original: Tensor, rows: slice) -> Tensor:
        merged = merge.merged(original, rows)
        undo.add(rows, merged.needed)
        return merged.weight

    result = _by_blocks(merge, kind, stored, change)
    return result, undo.tensors[0]


@torch.no_grad()
def unmerge_tensor(kind: Kind, applied: Applied, merged: Tensor, needed: Mapping[str, Tensor]) -> Tensor:
    """Return a new tensor, the original weight up to rounding."""
    merge = _in_memory("", kind, applied, merged)
    return _by_blocks(merge, kind, merged, lambda block, rows: merge.nearly(block, rows, [needed]))


def _in_memory(name: str, kind: Kind, applied: Applied, stored: Tensor) -> TensorMerge:
    shape, dtype = tuple(stored.shape), stored.dtype
    return TensorMerge(name, shape, dtype, dtype, kind, [applied], device=stored.device)


def _by_blocks(merge: TensorMerge, kind: Kind, stored: Tensor, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
    result = torch.empty_like(stored, memory_format=torch.contiguous_format)
    blocks = MemoryBlocks(kind, stored, result, by_rows=merge.by_rows)
    with exactly(stored):
        for rows in blocks.rows:
            blocks.write(rows, change(blocks.read(rows), rows))
    return result


@torch.no_grad()
def reference(applied: Sequence[Applied], weight: Tensor, rows: slice) -> Tensor:
    """Compute the result of `LayerMerge` one adapter after the other, in float64. A factor f adds f times the change.

    An entry that is not finite stays as it is: infinity less infinity would be NaN.
    """
    params = [{key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in one.params.items()} for one in applied]
    result = weight
    for one, own in zip(applied, params, strict=True):
        merged = one.hooks.merge(one.config, own, result if one.factor == 1 else weight, rows)
        result = merged if one.factor == 1 else torch.where(weight.isfinite(), result + one.factor * (merged - weight), weight)
    return result
