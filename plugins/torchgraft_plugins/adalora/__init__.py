"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): LoRA whose ranks are chosen per layer during training.

There are two allocators, each in a module of its own:

`energy` (the default) uses the singular values of the update. Every `interval` steps, B·A = U·Σ·Vᵀ is rebuilt from the
fewest directions that drop at most a share ε of Σσ²; when the validation loss stalls, directions are added.

`budget` is the paper's. ΔW = s·P·Λ·Q with a diagonal Λ (B is P, E is Λ, A is Q), triplets are scored by sensitivity and
uncertainty, one budget for all layers falls on a cubic schedule, and the loss gets a penalty γ·(‖PᵀP - 1‖² + ‖QQᵀ - 1‖²).

In both, s is that of the initial rank, and tensors and optimizer moments change their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torchgraft as tg
from torchgraft import hookimpl
from torchgraft_plugins.adalora.budget import budget_step
from torchgraft_plugins.adalora.config import AdaloraConfig
from torchgraft_plugins.adalora.energy import energy_step
from torchgraft_plugins.adalora.peft import AdaloraPeft

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.optim import Optimizer

SPREAD = 0.02
"""Initial standard deviation of P and Q, as in the authors' code."""


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method(
        name="adalora",
        config=AdaloraConfig,
        summary="LoRA that chooses the rank of each layer during training",
        reference="https://arxiv.org/abs/2303.10512",
        roles={"A": "A", "B": "B"},
        additive=True,
        peft=AdaloraPeft(),
    )


@hookimpl
def adapter_shapes(site: tg.Site, config: AdaloraConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"A": (config.r, site.in_features), "B": (site.out_features, config.r)}
    return shapes | {"E": (config.r, 1)} if config.allocator == "budget" else shapes


@hookimpl
def adapter_init(site: tg.Site, config: AdaloraConfig, generator: Generator) -> dict[str, Tensor]:
    params = tg.init_factors(site, config, generator)
    a, b = params["A"][: config.r], params["B"][:, : config.r]
    if config.allocator == "energy":
        return {"A": a, "B": b}
    for factor in (a, b):
        factor.normal_(0, SPREAD, generator=generator)
    if site.padding_idx is not None:
        a[:, site.padding_idx] = 0
    return {"A": a, "B": b, "E": a.new_zeros(config.r, 1)}


@hookimpl
def adapter_forward(
    site: tg.Site, config: AdaloraConfig, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]
) -> Tensor:
    if config.r == 0:
        return base(x)
    a, b = _factors(params)
    return site.low_rank(x, base, a, b, config.scale, config.dropout)


@hookimpl
def adapter_merge(config: AdaloraConfig, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    a, b = _factors(params)
    return weight.addmm(b[rows], a, alpha=config.scale)


@hookimpl
def adapter_unmerge(config: AdaloraConfig, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    a, b = _factors(params)
    return weight.addmm(b[rows], a, alpha=-config.scale)


@hookimpl
def adapter_to_lora(site: tg.Site, config: AdaloraConfig, params: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    a, b = _factors(params)
    return config.scale, {"A": a, "B": b}


@hookimpl
def adapter_param_groups(adapter: tg.Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    return tg.scaled_param_groups(adapter, lr, weight_decay)


@hookimpl
def adapter_penalty(site: tg.Site, config: AdaloraConfig, params: Mapping[str, Tensor]) -> Tensor | None:
    if config.allocator == "energy" or not config.orthogonality:
        return None
    a, b = params["A"].float(), params["B"].float()
    return config.orthogonality * (_distance_from_one(a @ a.T) + _distance_from_one(b.T @ b))


@hookimpl
def adapter_step(adapter: tg.Adapter, optimizer: Optimizer, step: int, metrics: Mapping[str, float]) -> None:
    if adapter.config.allocator == "energy":
        energy_step(adapter, optimizer, step, metrics)
    else:
        budget_step(adapter, optimizer, step)


def _factors(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A and B whose product is the update; Λ is multiplied into A."""
    return (params["E"] * params["A"] if "E" in params else params["A"]), params["B"]


def _distance_from_one(gram: Tensor) -> Tensor:
    import torch

    return (gram - torch.eye(len(gram), device=gram.device)).square().sum()
