"""AdaLoRA's allocator `budget`: the paper's, one budget of triplets (P column, λ, Q row) for all layers.

    I = |w·∇w|    Ī = β₁·Ī + (1-β₁)·I    U = β₂·U + (1-β₂)·|I - Ī|    s(w) = Ī·U        for each entry w
    Sᵢ = s(λᵢ) + meanⱼ s(Pⱼᵢ) + meanⱼ s(Qᵢⱼ)                                            for each triplet i
    b(t) = b_T + (b₀ - b_T)·(1 - (t - t_i) / (T - t_i - t_f))³                          for t_i ≤ t < T - t_f

The b(t) triplets with the highest scores, over all layers, are kept. The others are parked: they are out of the
parameters, their I is 0, so their scores decay; should one's score be high enough again, it comes back with λ = 0.

Differences from the paper:
- As in the authors' code, `adapter.step` comes after the optimizer's step, so w in I is the updated one.
- t - t_i stands for the paper's t - t_i - t_f in the schedule, which would start above b₀.
- The paper masks λ and lets it train until the next decision, so that it can win its place back by a gradient. What is
  parked here has none, and comes back more rarely; at an interval of 1 the paper's I of a masked triplet is 0, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torchgraft as tg
from torchgraft_plugins.adalora_config import AdaloraConfig
from torchgraft_plugins.adalora_moments import HISTORY, carry_rows, note

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


def budget_step(adapter: tg.Adapter, optimizer: Optimizer, step: int) -> None:
    config, state = adapter.config, adapter.state
    if state.get("finished"):
        return
    if all(parameter.grad is None for part in adapter.parts.values() for parameter in part.parameters()):
        raise tg.AttachError(
            f"the adapter {adapter.name!r} has no gradients, which adalora's budget needs; call adapter.step(optimizer, step=…) after "
            "loss.backward() and optimizer.step(), and before optimizer.zero_grad()"
        )
    if all(
        parameter.grad.isfinite().all() for part in adapter.parts.values() for parameter in part.parameters() if parameter.grad is not None
    ):
        for part in adapter.parts.values():  # not after a step that a GradScaler skipped
            _update_importance(state, part, config.beta1, config.beta2)
    last = config.total_steps - config.final
    if step >= last or (step >= config.warmup and step % config.interval == 0):
        _allocate(adapter, optimizer, step)
    if step >= last:  # what was parked can no longer come back
        state["finished"] = True
        for key in [key for key in state if key not in (HISTORY, "finished")]:
            del state[key]


def budget(config: AdaloraConfig, step: int, sites: int, start: int) -> int:
    """b(t): how many triplets all sites have together after `step`; `start` is b₀."""
    last = config.total_steps - config.final  # type: ignore[operator]
    if step < config.warmup:
        return start
    left = max(0.0, 1 - (step - config.warmup) / (last - config.warmup))
    end = config.target * sites
    return int(end + (start - end) * left**3)


def _update_importance(state: dict[str, Any], part: tg.SitePart, beta1: float, beta2: float) -> None:
    """Ī and U of every triplet, the parked ones included, in rows: (r₀, in) for A, (r₀, 1) for E, (r₀, out) for B."""
    import torch

    kept = _kept(state, part)
    for name, parameter in part.named_parameters():
        current = torch.zeros(len(kept), _rows(name, parameter).shape[1], device=parameter.device)
        if parameter.grad is not None:
            current[kept] = _rows(name, (parameter.detach() * parameter.grad).abs().float())
        mean, uncertainty = (_kept_beside(state, f"{part.site.name}.{name}.{what}", current) for what in ("sensitivity", "uncertainty"))
        mean.mul_(beta1).add_(current, alpha=1 - beta1)
        uncertainty.mul_(beta2).add_((current - mean).abs(), alpha=1 - beta2)


def _scores(state: Mapping[str, Any], site: str) -> Tensor:
    """S of every triplet of one site."""
    of = {name: state[f"{site}.{name}.sensitivity"] * state[f"{site}.{name}.uncertainty"] for name in ("A", "E", "B")}
    scores: Tensor = of["E"].sum(1) + of["B"].mean(1) + of["A"].mean(1)
    return scores


def _allocate(adapter: tg.Adapter, optimizer: Optimizer, step: int) -> None:
    """Keep the b(t) triplets with the highest scores over all sites, but at least min_rank in each."""
    import torch

    parts = adapter.parts
    scores = []
    for name, part in parts.items():
        own = _scores(adapter.state, name).cpu()
        own[own.argsort(descending=True, stable=True)[: part.config.least]] = float("inf")
        scores.append(own)
    ends = torch.tensor([0, *map(len, scores)]).cumsum(0).tolist()
    total = budget(adapter.config, step, len(parts), ends[-1])
    best = torch.cat(scores).argsort(descending=True, stable=True)
    chosen = torch.zeros(ends[-1], dtype=torch.bool)
    chosen[best[: max(total, int(torch.cat(scores).isinf().sum()))]] = True
    changes = {
        name: change
        for (name, part), (first, end) in zip(parts.items(), pairwise(ends), strict=True)
        if (change := _reallocated(adapter.state, part, chosen[first:end])) is not None
    }
    adapter.resize(changes, optimizer)
    note(adapter, step, "allocate")


def _reallocated(state: dict[str, Any], part: tg.SitePart, chosen: Tensor) -> tg.Resize | None:
    """Park what is not chosen, and take back what is."""
    import torch

    kept = _kept(state, part).cpu()
    if chosen.equal(kept):
        return None
    place = torch.full((len(kept),), -1).masked_scatter(kept, torch.arange(int(kept.sum())))
    tensors = {}
    for name, parameter in part.named_parameters():
        rows = _rows(name, parameter.detach())
        parked = _kept_beside(state, f"{part.site.name}.{name}.parked", rows.new_zeros(len(kept), rows.shape[1]))
        parked[kept] = rows
        taken = parked[chosen]
        if name == "E":
            taken[~kept[chosen]] = 0
        tensors[name] = taken.T if name == "B" else taken
    state[f"{part.site.name}.kept"] = chosen
    return tg.Resize(tensors, part.config.at(int(chosen.sum())), carry_rows(place[chosen].tolist()))


def _kept(state: dict[str, Any], part: tg.SitePart) -> Tensor:
    """Which of the initial triplets are in the parameters."""
    import torch

    kept: Tensor = state.setdefault(f"{part.site.name}.kept", torch.ones(part.config.r, dtype=torch.bool))
    return kept


def _rows(name: str, tensor: Tensor) -> Tensor:
    """One row for each triplet."""
    return tensor.T if name == "B" else tensor


def _kept_beside(state: dict[str, Any], key: str, like: Tensor) -> Tensor:
    """A tensor of the state on the device of `like`, which has its shape; zeros at first."""
    state[key] = state[key].to(like.device) if key in state else like.new_zeros(like.shape)
    found: Tensor = state[key]
    return found
