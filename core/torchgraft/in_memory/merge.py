"""Merge an adapter into the weights of a model in memory, and unmerge it bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from torchgraft.arithmetic.bias_merge import BiasMerge
from torchgraft.arithmetic.exact import BITS, make_correction, restore
from torchgraft.arithmetic.layer_merge import Applied, changes_bias, check_no_bias
from torchgraft.arithmetic.precision import replacement
from torchgraft.arithmetic.tensor_merge import merge_tensor, unmerge_tensor
from torchgraft.errors import MergeError
from torchgraft.hashes import sha256_of_tensor
from torchgraft.in_memory.graft import become, form_of
from torchgraft.in_memory.parts import Part, SitePart, TrainedCopy, Undo, parts_of
from torchgraft.kinds.quantizing import Dequantized
from torchgraft.layers.layer import shares_weight
from torchgraft.layers.of_module import own_state
from torchgraft.method.site import Site, fingerprint_of

Parts = Mapping[str, tuple[nn.Module, Part]]


def merge_parts(adapter: str, parts: Parts, tied: Mapping[str, tuple[str, ...]], biases: Mapping[str, str]) -> None:
    """Merge every part into its module. If it raises, nothing has changed.

    Args:
        adapter: the adapter's name, for messages.
        tied: layer → the layers that share its weight.
        biases: layer → a parameter that shares the memory of its bias.

    Raises:
        MergeError: a part is merged already, a tensor cannot be written or is shared, the order of merging is wrong, or a
            result is not finite.
    """
    for name, (module, part) in parts.items():
        if part.undo is not None:
            raise MergeError(f"the adapter {adapter!r} is merged already ({name}); unmerge it first")
        _check_weights(name, module, part, tied)
        if name in biases and isinstance(part, SitePart) and changes_bias(_applied(part), part.site.out_features):
            raise MergeError(
                f"{name}: its bias shares memory with {biases[name]}, so merging would change both. Give it a bias of its own, "
                "or leave the adapter unmerged"
            )
        _check_order(name, module, part)
    _all_or_nothing(parts, _merge_part, _restore)


def unmerge_parts(adapter: str, parts: Parts, discard_edits: bool) -> None:
    """Restore every module's original tensors. If it raises, nothing has changed.

    Raises:
        MergeError: a part is not merged, another adapter was merged after it, or tensors changed since the merge.
    """
    for name, (module, part) in parts.items():
        if part.undo is None:
            raise MergeError(f"the adapter {adapter!r} is not merged ({name})")
        if part.undo.depth != _merges_on(module) - 1:
            raise MergeError(f"{name}: another adapter was merged after {adapter!r}; unmerge that one first")
        _check_unedited(name, dict(module._parameters) if isinstance(part, SitePart) else own_state(module), part.undo)  # type: ignore[arg-type]
    for name, (_, part) in parts.items():
        _check_adapter(name, part, discard_edits)
    _all_or_nothing(parts, _restore, _merge_part)  # merging again is the same arithmetic on the same bits


def forget(module: nn.Module, undo: Undo) -> None:
    """Make a merge permanent: decrement the depth of every merge made after it."""
    for part in parts_of(module):
        if part.undo is not None and part.undo.depth > undo.depth:
            part.undo = replace(part.undo, depth=part.undo.depth - 1)


def _all_or_nothing(parts: Parts, do: Callable[[str, nn.Module, Part], None], undo: Callable[[str, nn.Module, Part], None]) -> None:
    """Call `do` on every part. If one call raises, call `undo` on the parts before it and raise again."""
    done: list[str] = []
    try:
        for name, (module, part) in parts.items():
            do(name, module, part)
            done.append(name)
    except BaseException:
        for name in reversed(done):
            undo(name, *parts[name])
        raise


def _check_weights(name: str, module: nn.Module, part: Part, tied: Mapping[str, tuple[str, ...]]) -> None:
    if isinstance(part, SitePart) and module._parameters.get("weight") is None:
        raise MergeError(
            f"{name}: its weight is computed since the adapter was attached (a parametrization, weight_norm or pruning), so nothing can be "
            "merged into it; remove that first"
        )
    written = _written(module, part)
    for layer, others in tied.items():
        if others and (layer == name or layer.startswith(f"{name}.")) and "weight" in {key.rpartition(".")[2] for key in written}:
            raise MergeError(
                f"{shares_weight(layer, others)}, so merging would change both. "
                "Give one of them a weight of its own, or leave the adapter unmerged"
            )
    for key, tensor in written.items():
        if tensor.is_meta:
            raise MergeError(f"{name}: its {key} is on the meta device and has no values to merge into")
        if tensor.is_inference():
            raise MergeError(f"{name}: its {key} was created in torch.inference_mode and cannot be written; load the model outside it")
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise MergeError(f"{name}: its {key} was expanded, so its entries share memory; clone it first")


def _written(module: nn.Module, part: Part) -> dict[str, Tensor]:
    """Return the tensors of `module` that a merge of `part` overwrites or replaces."""
    if not isinstance(part, SitePart):
        return dict(module.named_parameters())
    keys = [key for key, there in (("weight", part.hooks.merges_weight), ("bias", part.hooks.merges_bias)) if there]
    return {key: tensor for key in keys if (tensor := module._parameters.get(key)) is not None}


def _check_order(name: str, module: nn.Module, part: Part) -> None:
    """Check that no earlier adapter is left unmerged where the order matters: a method that is not additive depends on its input weight."""
    parts = parts_of(module)
    earlier = [other for other in parts[: parts.index(part)] if other.runs]
    ordered = [other for other in (*earlier, part) if isinstance(other, SitePart) and not other.hooks.method.additive]
    if earlier and ordered:
        raise MergeError(
            f"{name}: {ordered[0].method} depends on the weight with the earlier adapters in it, so adapters on this layer are merged in "
            "the order in which they were attached: merge the earlier one first"
        )


def check_switchable(adapter: str, parts: Parts) -> None:
    """Check that no merged result depends on whether this adapter is active.

    Raises:
        MergeError: a later adapter is merged, and it or this adapter is not additive.
    """
    for name, (module, part) in parts.items():
        found = parts_of(module)
        merged = [other for other in found[found.index(part) + 1 :] if other.undo is not None]
        if merged and any(isinstance(other, SitePart) and not other.hooks.method.additive for other in (part, *merged)):
            raise MergeError(
                f"{name}: an adapter that was attached after {adapter!r} is merged, and the two depend on their order; unmerge that first"
            )


def _merge_part(name: str, module: nn.Module, part: Part) -> None:
    if isinstance(part, SitePart):
        _merge_site(name, module, part)
    elif isinstance(part, TrainedCopy):
        _merge_copy(name, module, part)


def _merge_site(name: str, module: nn.Module, part: SitePart) -> None:
    kind, applied = part.site.kind, _applied(part)
    bias = _merged_bias(name, applied, module, part.site.out_features)
    undo = Undo(
        snapshot=_snapshot(part.tensors()),
        merged={key: sha256_of_tensor(tensor) for key, tensor in bias.items()},
        originals=_snapshot({key: module._parameters[key] for key in bias}),  # type: ignore[misc]
        depth=_merges_on(module),
        fingerprint=frozen_fingerprint(part.site) if part.hooks.method.additive else fingerprint_of(part.site),
    )
    if not part.hooks.merges_weight:
        _write(module._parameters, bias)  # type: ignore[arg-type]
        part.undo = undo
        return
    original = part.site.stored_weight()
    merged, needed = merge_tensor(name, kind, applied, original)
    undo = replace(undo, merged={**undo.merged, "weight": sha256_of_tensor(merged)})
    if kind.quantized and not isinstance(module, Dequantized):
        # The result cannot be represented in quantized codes, so the layer is dense until it is unmerged.
        undo = replace(undo, form=form_of(module))
        new = nn.Parameter(bias["bias"], requires_grad=False) if bias else module.bias
        become(module, form_of(Dequantized(merged, new)))  # type: ignore[arg-type]
    else:
        approximate = unmerge_tensor(kind, applied, merged, needed)
        undo = replace(undo, correction=make_correction(original, approximate), original=sha256_of_tensor(original), needed=needed)
        _write(own_state(module), {"weight": merged, **bias})
    part.undo = undo


def _applied(part: SitePart) -> Applied:
    return Applied(part.hooks, part.config, part.params())


def _merged_bias(name: str, applied: Applied, module: nn.Module, rows: int) -> dict[str, Tensor]:
    """Return {"bias": merged bias}; empty if the layer has no bias or the method does not change it."""
    bias = module._parameters.get("bias")
    if bias is None:
        check_no_bias(name, applied, rows)
    if bias is None or not applied.hooks.merges_bias:
        return {}
    original = bias.detach()
    return {"bias": BiasMerge(f"{name}.bias", bias.dtype, bias.dtype, [applied]).merged(original, slice(None)).weight}


def _merge_copy(name: str, module: nn.Module, part: TrainedCopy) -> None:
    originals, trained = own_state(module), part.module.state_dict()
    replaced = {key: replacement(f"{name}: {key}", tensor, originals[key].shape, originals[key].dtype) for key, tensor in trained.items()}
    undo = Undo(
        originals=_snapshot(originals),
        snapshot=_snapshot(trained),
        merged={key: sha256_of_tensor(tensor) for key, tensor in replaced.items()},
        depth=_merges_on(module),
    )
    _write(originals, replaced)
    part.undo = undo


def _restore(name: str, module: nn.Module, part: Part) -> None:
    undo = part.undo
    assert undo is not None
    if undo.form is not None:
        become(module, undo.form)
    elif isinstance(part, SitePart) and undo.correction is not None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        applied = Applied(part.hooks, part.config, {**part.params(), **undo.snapshot})
        approximate = unmerge_tensor(part.site.kind, applied, weight.detach(), undo.needed)
        _write(own_state(module), {"weight": restore(approximate, undo.correction, undo.original, name), **undo.originals})
    elif isinstance(part, SitePart):
        _write(module._parameters, undo.originals)  # type: ignore[arg-type]
    else:
        _write(own_state(module), undo.originals)
    part.undo = None


def _check_unedited(name: str, state: Mapping[str, Tensor], undo: Undo) -> None:
    """Check the merged tensors before anything is restored, because the corrections would turn an edit into wrong weights."""
    for key, expected in undo.merged.items():
        if sha256_of_tensor(state[key]) != expected:
            raise MergeError(f"{name}: its {key} was changed after the merge, and unmerging would lose that change. Nothing was changed")


def _check_adapter(name: str, part: Part, discard_edits: bool) -> None:
    assert part.undo is not None
    tensors = part.tensors() if isinstance(part, SitePart) else part.module.state_dict() if isinstance(part, TrainedCopy) else {}
    changed = [key for key, merged in part.undo.snapshot.items() if not _same_bits(tensors[key].detach(), merged)]
    if changed and not discard_edits:
        raise MergeError(
            f"{name}: the adapter's {', '.join(changed)} changed while it was merged, so it no longer matches the weights. "
            "unmerge(discard_edits=True) resets it to the values that were merged"
        )
    _write(tensors, {key: part.undo.snapshot[key] for key in changed})


def _snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    bits = BITS[other.element_size()]
    return one.dtype == other.dtype and one.view(bits).equal(other.view(bits))


def _merges_on(module: nn.Module) -> int:
    return sum(part.undo is not None for part in parts_of(module))


@torch.no_grad()
def _write(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy every value into its target. If one copy raises, restore the others."""
    before = {key: targets[key].clone() for key in values}
    try:
        for key, value in values.items():
            targets[key].copy_(value)
    except BaseException:
        for key, value in before.items():
            targets[key].copy_(value)
        raise


def frozen_fingerprint(site: Site) -> str:
    """Return the fingerprint of the weight as it was before any adapter was merged into it."""
    parts = parts_of(site.module) if site.module is not None else []
    first = next((part.undo for part in parts if part.undo is not None and part.undo.depth == 0), None)
    return first.fingerprint if first is not None else fingerprint_of(site)
