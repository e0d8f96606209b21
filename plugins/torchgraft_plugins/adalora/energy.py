"""The allocator `energy` of AdaLoRA: ranks follow from the singular values of each layer's update B·A.

r' = the smallest k with Σ_{i>k} σᵢ² / Σ σᵢ² ≤ ε        min_rank ≤ r' ≤ max_rank
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

import torchgraft as tg
from torchgraft_plugins.adalora.moments import carry_rows, note

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

VALIDATION = ("val_loss", "validation_loss", "eval_loss")
"""Keys of `metrics` that are read as the validation loss."""


def energy_step(adapter: tg.Adapter, optimizer: Optimizer, step: int, metrics: Mapping[str, float]) -> None:
    seen = adapter.state.setdefault("seen", [])
    seen += [float(metrics[name]) for name in VALIDATION if name in metrics and isfinite(metrics[name])]
    if step % adapter.config.interval:
        return
    grow = _stalled(adapter.state, adapter.config.tolerance)
    changes = {name: change for name, part in adapter.parts.items() if (change := (_grown if grow else _shrunk)(part, step))}
    adapter.resize(changes, optimizer)
    note(adapter, step, "grow" if grow else "shrink")


def _stalled(state: dict[str, Any], tolerance: float) -> bool:
    """Return whether no validation loss since the last decision on ranks is lower, by the share `tolerance`, than the lowest one before."""
    seen, best = state["seen"], state.get("best")
    state["seen"] = []
    if not seen:
        return False
    state["best"] = min(seen) if best is None else min(best, *seen)
    return best is not None and min(seen) > best - tolerance * abs(best)


def _shrunk(part: tg.SitePart, step: int) -> tg.Resize | None:
    """Return the resize to the fewest directions that drop at most a share ε of the energy; None if that is all of them."""
    import torch

    config, params = part.config, part.tensors()
    a, b = params["A"].detach().double(), params["B"].detach().double()
    if not (a.sum() + b.sum()).isfinite():
        raise tg.AttachError(f"{part.site.name}: the adapter has NaN or infinite entries: the run has diverged; lower the learning rate")
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T)  # B·A = (Q_b·U)·Σ·(Vᵀ·Q_aᵀ)
    energy = sigma.square()
    kept = min(max(config.least, _fewest(energy, config.epsilon)), len(energy))
    if kept >= config.r or energy.sum() == 0:
        return None
    # A keeps its norm, and B takes the singular values. With S and T, B' = B·S and A' = T·A, so that gradients follow as
    # ∇B' = ∇B·Tᵀ and ∇A' = Sᵀ·∇A, and so do the moments that average them.
    size = a.norm() / config.r**0.5
    s = r_a.T @ vh[:kept].T / size
    t = size * vh[:kept] @ torch.linalg.pinv(r_a).T
    tensors = {"A": size * vh[:kept] @ q_a.T, "B": q_b @ u[:, :kept] * sigma[:kept] / size}
    if part.site.padding_idx is not None:  # zero except for rounding errors, and it must stay zero
        tensors["A"][:, part.site.padding_idx] = 0
    carry: dict[str, Callable[[Tensor, int], Tensor]] = {
        "A": lambda moment, power: (s.T**power) @ moment.double(),
        "B": lambda moment, power: moment.double() @ (t.T**power),
    }
    return tg.Resize({name: value.to(params[name].dtype) for name, value in tensors.items()}, config.at(kept), carry)


def _fewest(energy: Tensor, epsilon: float) -> int:
    """Return the smallest k with Σ_{i>k} σᵢ² ≤ ε·Σ σᵢ²; σ² descend."""
    dropped = energy.flip(0).cumsum(0).flip(0)  # energy of direction i and all later ones
    return int((dropped > epsilon * energy.sum()).sum())


def _grown(part: tg.SitePart, step: int) -> tg.Resize | None:
    """Return the resize that adds `growth` directions, with B = 0."""
    import torch

    config, params = part.config, part.tensors()
    more = min(config.growth, config.most - config.r)
    if more <= 0:
        return None
    a, b = params["A"].detach(), params["B"].detach()
    generator = torch.Generator().manual_seed(tg.seed_of(step, part.site.name))
    fresh = tg.init_factors(part.site, tg.LowRankConfig(rank=more), generator)["A"]
    tensors = {"A": torch.cat([a, fresh.to(a)]), "B": torch.cat([b, b.new_zeros(len(b), more)], dim=1)}
    places = torch.tensor([*range(config.r), *[-1] * more])
    return tg.Resize(tensors, config.at(config.r + more), carry_rows(places))
