"""The allocator `budget` of the AdaLoRA paper: one budget of triplets (P column, λ, Q row) for all layers.

    I = |w·∇w|    Ī = β₁·Ī + (1-β₁)·I    U = β₂·U + (1-β₂)·|I - Ī|    s(w) = Ī·U        for each entry w
    Sᵢ = s(λᵢ) + meanⱼ s(Pⱼᵢ) + meanⱼ s(Qᵢⱼ)                                            for each triplet i
    b(t) = b_T + (b₀ - b_T)·(1 - (t - t_i) / (T - t_i - t_f))³                          for t_i ≤ t < T - t_f

The b(t) triplets with the highest scores over all layers stay active. The others are parked: they are removed from the
parameters, and their I is 0, so their scores decay. A triplet whose score becomes high enough again returns with λ = 0.

Differences from the paper:
- As in the authors' code, `adapter.step` comes after the optimizer's step, so w in I is the updated one.
- The schedule uses t - t_i instead of the paper's t - t_i - t_f, which would start above b₀.
- The paper masks λ and lets it train until the next decision, so that a gradient can reactivate it. A triplet that is
  parked here has no gradient and returns more rarely. At an interval of 1, I of a masked triplet is 0 in the paper too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torchgraft as tg
from torchgraft_plugins.adalora.config import AdaloraConfig
from torchgraft_plugins.adalora.moments import HISTORY, carry_rows, note

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


AXIS = {"A": 0, "E": 0, "B": 1}
"""The dimension of each tensor that counts the triplets."""


def budget_step(adapter: tg.Adapter, optimizer: Optimizer, step: int) -> None:
    config, state = adapter.config, adapter.state
    if state.get("finished"):
        return
    _update_importance(adapter)
    last = config.total_steps - config.final
    if step >= last or (step >= config.warmup and step % config.interval == 0):
        _allocate(adapter, optimizer, step)
    if step >= last:  # parked triplets can no longer return
        state["finished"] = True
        for key in [key for key in state if key not in (HISTORY, "finished")]:
            del state[key]


def budget(config: AdaloraConfig, step: int, sites: int, start: int) -> int:
    """Return b(t), the number of active triplets of all sites after `step`; `start` is b₀."""
    last = config.total_steps - config.final  # type: ignore[operator]
    if step < config.warmup:
        return start
    left = max(0.0, 1 - (step - config.warmup) / (last - config.warmup))
    end = config.target * sites
    return int(end + (start - end) * left**3)


def _update_importance(adapter: tg.Adapter) -> None:
    """Update Ī and U of every triplet, parked ones included, except where I is not finite, as after a step that a GradScaler skipped.

    Uses torch's _foreach functions, as torch's optimizers do: one call for all tensors, and one synchronization with the device.
    """
    import torch

    current = _importance(adapter)
    mean, uncertainty = (_averages(adapter, what, current) for what in ("sensitivity", "uncertainty"))
    sums = [each.sum().to(current[0].device) for each in current]
    if not torch.stack(sums).sum().isfinite():
        return
    torch._foreach_lerp_(mean, current, 1 - adapter.config.beta1)
    torch._foreach_sub_(current, mean)
    torch._foreach_abs_(current)
    torch._foreach_lerp_(uncertainty, current, 1 - adapter.config.beta2)


def _importance(adapter: tg.Adapter) -> list[Tensor]:
    """Return I in float32, in the shape of the parameters with all r₀ triplets; 0 for parked ones."""
    import torch

    trained = [(parameter.detach(), parameter.grad) for _, _, parameter in _named(adapter) if parameter.grad is not None]
    if not trained:
        raise tg.AttachError(
            f"the adapter {adapter.name!r} has no gradients, which adalora's budget needs; call adapter.step(optimizer, step=…) after "
            "loss.backward() and optimizer.step(), and before optimizer.zero_grad()"
        )
    products = torch._foreach_mul(*map(list, zip(*trained, strict=True)))
    torch._foreach_abs_(products)
    left, found = iter(products), []
    for part in adapter.parts.values():
        places = _places(adapter.state, part)
        for name, parameter in part.tensors().items():
            own = (next(left) if parameter.grad is not None else torch.zeros_like(parameter, requires_grad=False)).float()
            found.append(own if places is None else _with_parked(own, AXIS[name], places))
    return found


def _places(state: dict[str, Any], part: tg.SitePart) -> Tensor | None:
    """Return the index of each initial triplet in the parameters (past the end if parked); None if all are active and in order."""
    import torch

    kept, device = _kept(state, part), part.tensors()["A"].device
    if len(kept) == part.config.r:
        return None
    return part.site.cached(
        f"places on {device}", [kept], lambda: torch.where(kept, kept.cumsum(0) - 1, torch.tensor(part.config.r)).to(device)
    )


def _with_parked(kept: Tensor, axis: int, places: Tensor) -> Tensor:
    """Fill in zeros for the parked triplets."""
    import torch

    return torch.nn.functional.pad(kept, (0, 1) if axis else (0, 0, 0, 1)).index_select(axis, places)


def _averages(adapter: tg.Adapter, what: str, like: list[Tensor]) -> list[Tensor]:
    named = zip(_named(adapter), like, strict=True)
    return [_stored_like(adapter.state, f"{part.site.name}.{name}.{what}", name, each, each) for (part, name, _), each in named]


def _scores(state: Mapping[str, Any], site: str) -> Tensor:
    """Return S of every triplet of one site."""
    of = {name: state[f"{site}.{name}.sensitivity"] * state[f"{site}.{name}.uncertainty"] for name in ("A", "E", "B")}
    scores: Tensor = of["E"].sum(1) + of["B"].mean(1) + of["A"].mean(1)
    return scores


def _allocate(adapter: tg.Adapter, optimizer: Optimizer, step: int) -> None:
    """Keep the b(t) triplets with the highest scores over all sites, and at least min_rank per site."""
    import torch

    parts = adapter.parts
    own = [_scores(adapter.state, name) for name in parts]
    scores = torch.cat([each.to(own[0].device) for each in own]).cpu()
    ends = torch.tensor([0, *map(len, own)]).cumsum(0).tolist()
    bounds = dict(zip(parts, pairwise(ends), strict=True))
    for name, (first, end) in bounds.items():
        if least := parts[name].config.least:
            scores[first:end][scores[first:end].argsort(descending=True, stable=True)[:least]] = float("inf")
    total = budget(adapter.config, step, len(parts), ends[-1])
    best = scores.argsort(descending=True, stable=True)
    chosen = torch.zeros(ends[-1], dtype=torch.bool)
    chosen[best[: max(total, int(scores.isinf().sum()))]] = True
    changes = {
        name: change
        for name, (first, end) in bounds.items()
        if (change := _reallocated(adapter.state, parts[name], chosen[first:end])) is not None
    }
    adapter.resize(changes, optimizer)
    note(adapter, step, "allocate")


def _reallocated(state: dict[str, Any], part: tg.SitePart, chosen: Tensor) -> tg.Resize | None:
    """Park the triplets that are not chosen, and return chosen ones to the parameters."""
    import torch

    kept, tensors = _kept(state, part).cpu(), part.tensors()
    if chosen.equal(kept):
        return None
    device = tensors["A"].device
    # index of each triplet in the concatenation of the parameter and the parked rows
    places = torch.where(kept, kept.cumsum(0) - 1, part.config.r + torch.arange(len(kept)))
    going, back = kept & ~chosen, chosen & ~kept
    parking, parked_from, taken_from = (each.to(device) for each in (going.nonzero()[:, 0], places[going], places[chosen]))
    for name, parameter in tensors.items():
        own, axis = parameter.detach(), AXIS[name]
        every = _rows(name, state[f"{part.site.name}.{name}.sensitivity"])
        parked = _stored_like(state, f"{part.site.name}.{name}.parked", name, every, own)
        if len(parking):
            parked.index_copy_(axis, parking, own.index_select(axis, parked_from))
        source = torch.cat([own, parked], axis) if back.any() else own
        tensors[name] = source.index_select(axis, taken_from)
        if name == "E" and back.any():
            tensors[name][back[chosen].to(device)] = 0
    state[f"{part.site.name}.kept"] = chosen
    return tg.Resize(tensors, part.config.at(len(taken_from)), carry_rows(torch.where(kept, places, -1)[chosen]))


def _named(adapter: tg.Adapter) -> Iterator[tuple[tg.SitePart, str, Tensor]]:
    return ((part, name, parameter) for part in adapter.parts.values() for name, parameter in part.tensors().items())


def _kept(state: dict[str, Any], part: tg.SitePart) -> Tensor:
    """Return a mask of the initial triplets that are in the parameters."""
    import torch

    key = f"{part.site.name}.kept"
    if key not in state:
        state[key] = torch.ones(part.config.r, dtype=torch.bool)
    kept: Tensor = state[key]
    return kept


def _rows(name: str, tensor: Tensor) -> Tensor:
    """Convert between a tensor and its rows, one per triplet."""
    return tensor.T if AXIS[name] else tensor


def _stored_like(state: dict[str, Any], key: str, name: str, shape: Tensor, like: Tensor) -> Tensor:
    """Return the stored tensor `key` in the shape of `shape`, on the device and in the dtype of `like`; zeros at first."""
    import torch

    # in the parameter's memory layout, because arithmetic with another layout takes twice as long; tensors from files have another one
    known = key in state
    found = _rows(name, state[key]) if known else torch.zeros_like(shape, device=like.device, dtype=like.dtype)
    if not known or found.device != like.device or found.dtype != like.dtype or not found.is_contiguous():
        found = found.to(like).contiguous()
        state[key] = _rows(name, found)
    return found
