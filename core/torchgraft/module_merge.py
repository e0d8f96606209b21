"""Merging an adapter into the weights of a model in memory, and taking it out again, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchgraft import fingerprint
from torchgraft.errors import MergeError
from torchgraft.exact import Undo, correct, make_correction
from torchgraft.graft import Part, SitePart, TrainedCopy, parts_of
from torchgraft.module_layers import own_state
from torchgraft.weights import merged_weight, nearly_unmerged

Parts = Mapping[str, tuple[nn.Module, Part]]


def merge(adapter: str, parts: Parts, tied: Mapping[str, tuple[str, ...]]) -> None:
    """Merge every part into its module, or none. `tied`: layer → the layers that share its weight."""
    for name, (module, part) in parts.items():
        if part.undo is not None:
            raise MergeError(f"the adapter {adapter!r} is merged already ({name}); unmerge it first")
        for layer in tied:
            if tied[layer] and (layer == name or layer.startswith(f"{name}.")):
                raise MergeError(
                    f"{layer}: its weight is also that of {', '.join(tied[layer])}, so merging would change both. "
                    "Give one of them a weight of its own, or leave the adapter unmerged"
                )
        if any(tensor.is_meta for tensor in module.parameters()):
            raise MergeError(f"{name}: its weight is on the meta device and has no values to merge into")
    done: list[tuple[str, nn.Module, Part]] = []
    try:
        for name, (module, part) in parts.items():
            _merge_part(name, module, part)
            done.append((name, module, part))
    except BaseException:
        for name, module, part in reversed(done):
            _restore(name, module, part)
        raise


def unmerge(adapter: str, parts: Parts, discard_edits: bool) -> None:
    """Give every module its original tensors, or change none."""
    for name, (module, part) in parts.items():
        if part.undo is None:
            raise MergeError(f"the adapter {adapter!r} is not merged ({name})")
        if part.undo.depth != _merges_on(module) - 1:
            raise MergeError(f"{name}: another adapter was merged after {adapter!r}; unmerge that one first")
    for name, (_, part) in parts.items():
        _check_edits(name, part, discard_edits)
    done: list[tuple[str, nn.Module, Part]] = []
    try:
        for name, (module, part) in parts.items():
            _restore(name, module, part)
            done.append((name, module, part))
    except BaseException:
        for name, module, part in reversed(done):
            _merge_part(name, module, part)  # the same arithmetic on the same bits
        raise


def _merge_part(name: str, module: nn.Module, part: Part) -> None:
    depth = _merges_on(module)
    if isinstance(part, TrainedCopy):
        originals = own_state(module)
        part.undo = Undo({}, {key: tensor.clone() for key, tensor in originals.items()}, depth)
        _write(originals, part.module.state_dict())
        return
    assert isinstance(part, SitePart)
    weight: Tensor = module.weight  # type: ignore[assignment]
    original = weight.detach()
    params = part.tensors()
    merged = merged_weight(part.hooks, name, part.site.kind, part.config, params, original)
    nearly = nearly_unmerged(part.hooks, part.site.kind, part.config, params, merged)
    snapshot = {key: tensor.detach().clone() for key, tensor in params.items()}
    part.undo = Undo({"weight": make_correction(original, nearly)}, snapshot, depth, fingerprint.of_tensor(original))
    _write({"weight": weight}, {"weight": merged})


def _restore(name: str, module: nn.Module, part: Part) -> None:
    assert part.undo is not None
    if isinstance(part, SitePart):
        weight: Tensor = module.weight  # type: ignore[assignment]
        nearly = nearly_unmerged(part.hooks, part.site.kind, part.config, part.undo.snapshot, weight.detach())
        _write({"weight": weight}, {"weight": correct(nearly, part.undo.corrections["weight"], name)})
    else:
        _write(own_state(module), part.undo.snapshot)
    part.undo = None


def _check_edits(name: str, part: Part, discard_edits: bool) -> None:
    if not isinstance(part, SitePart):
        return
    assert part.undo is not None
    tensors = part.tensors()
    changed = [key for key, merged in part.undo.snapshot.items() if not _same_bits(tensors[key].detach(), merged)]
    if changed and not discard_edits:
        raise MergeError(
            f"{name}: the adapter's {', '.join(changed)} changed while it was merged, so the weights do not hold what it says. "
            "unmerge(discard_edits=True) sets it back to what was merged"
        )
    _write(tensors, {key: part.undo.snapshot[key] for key in changed})


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8))


def _merges_on(module: nn.Module) -> int:
    return sum(part.undo is not None for part in parts_of(module))


@torch.no_grad()
def _write(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for key, value in values.items():
        targets[key].copy_(value)
