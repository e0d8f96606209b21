"""Checks of edge cases: no values, zero rows, the smallest and the largest rank."""

from __future__ import annotations

import torch

from torchgraft.testing.cases import Case, backward, part_of, perturb_
from torchgraft.testing.checks import check
from torchgraft.testing.compare import claimed, close, finite, require, same_bits


@check(layers="dense")
def meta(case: Case) -> None:
    """The method attaches to a model on the meta device; the parameters have the same shapes as elsewhere, and no values."""
    real = {name: tensor.shape for name, tensor in case.adapted(perturb=False)[1].named_parameters()}
    expected = case.base()(case.x).shape
    model = case.untouched().to("meta")
    adapter = case.attach(model)
    hint = "look at what adapter_init does with a weight that has no values"
    found = {name: tensor.shape for name, tensor in adapter.named_parameters()}
    require(found == real, f"the parameters on the meta device have shapes {found}, and {real} elsewhere; {hint}")
    for name, tensor in adapter.named_parameters():
        require(tensor.is_meta, f"{name} is on {tensor.device}, where the model is on the meta device; {hint}")
    if case.hooks.method.compiles:  # else forward may depend on values
        output = model(case.x.to("meta"))
        require(
            output.shape == expected, f"the output on the meta device has the shape {tuple(output.shape)}, not {tuple(expected)}; {hint}"
        )


@check(layers="dense")
def zero_rows(case: Case) -> None:
    """If rows of the weight, or all of it, are zero, forward, backward and merge give no NaN. Real models have such rows."""
    hint = "look for a division by the norm of a row"
    for rows in ([0, -1], slice(None)):
        zeroed = _with_zeros(case, rows)
        model = zeroed.base()
        adapter = zeroed.attach(model)
        before = part_of(adapter).site.stored_weight().clone()
        for when in ("at the start", "with perturbed parameters"):
            output = model(case.x)
            finite(output, f"the output {when}", hint)
            backward(output)
            for name, parameter in adapter.named_parameters():
                finite(parameter.grad, f"the gradient of {name} {when}", hint)
            perturb_(adapter)
        expected = model(case.x)
        adapter.merge()
        finite(part_of(adapter).site.stored_weight(), "the merged weight", hint)
        close(model(case.x), expected, case.eps, "the merged layer's output", f"{hint} in adapter_merge")
        adapter.unmerge()
        same_bits(part_of(adapter).site.stored_weight(), before, "the unmerged weight", hint)


@torch.no_grad()
def _with_zeros(case: Case, rows: list[int] | slice) -> Case:
    """Return the case with these canonical rows of the weight set to zero."""
    layer = case.untouched().layer
    weight = case.kind.weight_of(layer)
    matrix = case.kind.to_canonical(weight).clone()
    matrix[rows] = 0
    weight.copy_(case.kind.from_canonical(matrix, tuple(weight.shape)))
    return Case(case.name, case.options, case.kind, layer, case.input, case.dtype)


@check()
def rank_one(case: Case) -> None:
    """Rank 1 works, if the method has an option `rank`."""
    _at_rank(case, 1)


@check()
def full_rank(case: Case) -> None:
    """The largest rank that a layer can use, min(out_features, in_features), works, if the method has an option `rank`."""
    site = case.site(case.base())
    _at_rank(case, min(site.out_features, site.in_features))


def _at_rank(case: Case, rank: int) -> None:
    claimed("rank" in case.hooks.method.config.model_fields, "an option `rank`")
    hint = f"look at what depends on the rank, which is {rank} here"
    model, adapter = case.adapted(rank=rank)
    before = part_of(adapter).site.stored_weight().clone()
    expected = model(case.x)
    adapter.merge()
    close(model(case.x), expected, case.eps, f"the merged layer's output with rank {rank}", hint)
    adapter.unmerge()
    same_bits(part_of(adapter).site.stored_weight(), before, f"the unmerged weight with rank {rank}", hint)
