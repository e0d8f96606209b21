"""Merging one weight: the method's arithmetic in float32, rounded once to the weight's own dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchgraft.errors import MergeError
from torchgraft.kinds import Kind
from torchgraft.manager import MethodHooks
from torchgraft.site import from_canonical, to_canonical


def merged_weight(hooks: MethodHooks, name: str, kind: Kind, config: Any, params: Mapping[str, Tensor], stored: Tensor) -> Tensor:
    """`stored` with the adapter in it: a new tensor of the same shape and dtype.

    Raises:
        MergeError: an entry that was finite would become NaN or infinite.
    """
    merged = _through(hooks.merge, kind, config, params, stored)
    if not (merged.isfinite() | ~stored.isfinite()).all():
        raise MergeError(f"{name}: the merged weight has NaN or infinite entries ({_culprit(params, stored)}). Nothing was changed")
    return merged


def rounded(name: str, trained: Tensor, original: Tensor) -> Tensor:
    """A tensor that replaces `original` whole, in its dtype.

    Raises:
        MergeError: it has another shape, or an entry is NaN or infinite in that dtype.
    """
    if trained.shape != original.shape:
        raise MergeError(f"{name}: the trained tensor has the shape {list(trained.shape)}, the model's {list(original.shape)}")
    result = trained.to(original.dtype)
    if not result.isfinite().all():
        raise MergeError(f"{name}: the trained tensor has NaN or infinite entries as {original.dtype}. Nothing was changed")
    return result


@torch.no_grad()
def undo_tensors(hooks: MethodHooks, kind: Kind, config: Any, params: Mapping[str, Tensor], stored: Tensor) -> dict[str, Tensor]:
    """What the method needs to unmerge, beside its params and the merged weight."""
    weight = to_canonical(kind, stored)
    with exactly(weight):
        return hooks.undo(config, widened(params, weight), weight)


def nearly_unmerged(hooks: MethodHooks, kind: Kind, config: Any, params: Mapping[str, Tensor], merged: Tensor) -> Tensor:
    """What arithmetic makes of the original weight; `exact.correct` puts the rest right. `params` include `undo_tensors`."""
    return _through(hooks.unmerge, kind, config, params, merged)


def exactly(tensor: Tensor) -> torch.autocast:
    """A block in which an autocast that the caller is in does not narrow the arithmetic."""
    return torch.autocast(tensor.device.type, enabled=False)


def widened(params: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """The adapter's tensors in the type and on the device of a canonical weight."""
    return {name: tensor.detach().to(weight) if tensor.is_floating_point() else tensor for name, tensor in params.items()}


@torch.no_grad()
def _through(hook: Callable[..., Tensor], kind: Kind, config: Any, params: Mapping[str, Tensor], stored: Tensor) -> Tensor:
    weight = to_canonical(kind, stored)
    with exactly(weight):
        return from_canonical(kind, hook(config, widened(params, weight), weight), like=stored)


def _culprit(params: Mapping[str, Tensor], stored: Tensor) -> str:
    bad = [name for name, tensor in params.items() if not tensor.isfinite().all()]
    return f"the adapter's {', '.join(bad)} has them" if bad else f"the sum leaves the range of {stored.dtype}"
