"""Checks of the merge hooks alone, in float64: rows, the inverse, and the properties that a method claims for them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from torchgraft.arithmetic.precision import widened
from torchgraft.in_memory.adapter import Adapter
from torchgraft.testing.cases import Case, part_of
from torchgraft.testing.checks import check
from torchgraft.testing.compare import claimed, close, require

EPS = torch.finfo(torch.float64).eps
NEAR = 1e-10
"""Relative tolerance for an inverse, which may divide by small values."""


@check()
def rows(case: Case) -> None:
    """Merging and unmerging by blocks of rows gives the same result as for the whole weight. A merge that takes `rows` claims this."""
    claimed(case.hooks.merges_rows, "adapter_merge, adapter_unmerge and adapter_undo do not all take `rows`")
    hooks = MergeHooks(case.adapted()[1])
    blocks = _blocks(len(hooks.weight))
    merged, needed = hooks.merge(hooks.weight, slice(None)), hooks.undo(hooks.weight, slice(None))
    hint = "`weight` holds only the rows `rows`, but params hold all rows: index them with rows, as in b[rows]"
    _same_by_rows(merged, lambda rows: hooks.merge(hooks.weight[rows], rows), blocks, "adapter_merge", hint)
    _same_by_rows(hooks.merge(hooks.weight, slice(0, len(merged))), lambda rows: merged[rows], blocks, "adapter_merge", hint)
    for name, tensor in needed.items():
        _same_by_rows(tensor, lambda rows, key=name: hooks.undo(hooks.weight[rows], rows)[key], blocks, f"adapter_undo's {name}", hint)  # type: ignore[misc]
    if case.hooks.method.additive:
        return
    back = hooks.unmerge(merged, slice(None), needed)
    _same_by_rows(back, lambda rows: hooks.unmerge(merged[rows], rows, needed), blocks, "adapter_unmerge", hint)


def _same_by_rows(whole: Tensor, part: Callable[[slice], Tensor], blocks: list[slice], hook: str, hint: str) -> None:
    for block in blocks:
        close(part(block), whole[block], EPS, f"{hook} of rows {block.start} to {block.stop} of {len(whole)}", hint)


def _blocks(rows: int) -> list[slice]:
    """Return three blocks of different sizes."""
    ends = [0, 1, 1 + rows // 3, rows]
    return [slice(first, end) for first, end in pairwise(ends)]


@check()
def pure(case: Case) -> None:
    """The merge hooks return tensors of the same shape and dtype and do not change their arguments."""
    hooks = MergeHooks(case.adapted()[1])
    weight, params = hooks.weight.clone(), {name: tensor.clone() for name, tensor in hooks.params.items()}
    merged = hooks.merge(weight, slice(None))
    results = {"adapter_merge": merged}
    if not case.hooks.method.additive:
        before = merged.clone()
        results["adapter_unmerge"] = hooks.unmerge(merged, slice(None), hooks.undo(weight, slice(None)))
        require(merged.equal(before), "adapter_unmerge changed `weight` in place; return a new tensor")
    require(weight.equal(hooks.weight), "adapter_merge changed `weight` in place; return a new tensor")
    if case.hooks.merges_bias and case.site(case.base()).has_bias:
        bias = torch.randn(len(weight), dtype=weight.dtype)
        before, results["adapter_merge_bias"] = bias.clone(), hooks.merge_bias(bias)[:, None].expand_as(weight)
        require(bias.equal(before), "adapter_merge_bias changed `bias` in place; return a new tensor")
    for name, tensor in params.items():
        require(hooks.params[name].equal(tensor), f"adapter_merge or adapter_unmerge changed {name} in place; make a new tensor")
    for hook, result in results.items():
        found = f"{tuple(result.shape)} of {result.dtype}"
        require(
            (result.shape, result.dtype) == (weight.shape, weight.dtype),
            f"{hook} returned {found}, where `weight` is {tuple(weight.shape)} of {weight.dtype}; keep its dtype and shape",
        )


@check()
def additive(case: Case) -> None:
    """The change that a merge adds does not depend on the weight. `Method.additive` claims this."""
    claimed(case.hooks.method.additive, "additive")
    hooks = MergeHooks(case.adapted()[1])
    change = hooks.merge(torch.zeros_like(hooks.weight), slice(None))
    hint = "a method whose change depends on the weight is not additive: leave Method.additive out"
    close(hooks.merge(hooks.weight, slice(None)), hooks.weight + change, EPS, "the merged weight, against W + merge(0)", hint)
    if case.hooks.merges_bias and case.site(case.base()).has_bias:
        bias = torch.randn(len(hooks.weight), dtype=torch.float64)
        expected = bias + hooks.merge_bias(torch.zeros_like(bias))
        close(hooks.merge_bias(bias), expected, EPS, "the merged bias, against b + merge_bias(0)", hint)


@check()
def to_lora(case: Case) -> None:
    """The factors that adapter_to_lora returns give the same change as a merge: ΔW = s·B·A."""
    claimed(case.hooks.has("adapter_to_lora"), "adapter_to_lora")
    _, adapter = case.adapted()
    hooks, part = MergeHooks(adapter), part_of(adapter)
    scale, factors = case.hooks.to_lora(part.site, part.config, part.params())
    require(set(factors) == {"A", "B"}, f"adapter_to_lora returned {sorted(factors)}, not A and B")
    a, b = (factors[key].detach().double() for key in "AB")
    out, width = hooks.weight.shape
    require(
        a.shape[1:] == (width,) and b.shape[:1] == (out,) and a.shape[0] == b.shape[1],
        f"adapter_to_lora returned A {tuple(a.shape)} and B {tuple(b.shape)}; they are (r, {width}) and ({out}, r)",
    )
    merged = hooks.merge(hooks.weight, slice(None))
    close(hooks.weight + scale * b @ a, merged, case.eps, "W + s·B·A, against adapter_merge", "look at adapter_to_lora: its scale?")


def check_inverse(adapter: Adapter) -> None:
    """Check that adapter_unmerge approximately inverts adapter_merge. An additive method's adapter_unmerge is never called.

    Raises:
        FailedError: it does not.
    """
    hooks = MergeHooks(adapter)
    merged, needed = hooks.merge(hooks.weight, slice(None)), hooks.undo(hooks.weight, slice(None))
    hint = "if adapter_unmerge needs more than the merged weight and params, return it from the hook adapter_undo"
    close(hooks.unmerge(merged, slice(None), needed), hooks.weight, NEAR, "the weight that adapter_unmerge returns", hint)


class MergeHooks:
    """The merge hooks of one adapter, with its parameters and the canonical weight in float64."""

    def __init__(self, adapter: Adapter) -> None:
        part = part_of(adapter)
        self.weight = part.site.weight().to(torch.float64, copy=True)
        self.params = widened(part.params(), torch.float64)
        self._hooks, self._config = part.hooks, part.config

    def merge(self, weight: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            return self._hooks.merge(self._config, self.params, weight, rows)

    def merge_bias(self, bias: Tensor) -> Tensor:
        with torch.no_grad():
            return self._hooks.merge_bias(self._config, self.params, bias)

    def undo(self, weight: Tensor, rows: slice) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._hooks.undo(self._config, self.params, weight, rows)

    def unmerge(self, weight: Tensor, rows: slice, needed: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self._hooks.unmerge(self._config, {**self.params, **needed}, weight, rows)
