"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): LoRA whose rank is decided layer by layer, while it trains.

Two ways to decide it, each in a module of its own:

`energy` (the default): the singular values of the update. Every `interval` steps W = B·A = U·Σ·Vᵀ is rebuilt from the
fewest directions whose dropped share of Σσ² is at most ε; while the validation loss stalls, directions are added.

`budget`: the paper's. ΔW = s·P·Λ·Q with a diagonal Λ (B is P, E is Λ, A is Q), triplets scored by sensitivity and
uncertainty, a budget for all layers that falls on a cubic schedule, and a penalty γ·(‖PᵀP - 1‖² + ‖QQᵀ - 1‖²).

In both s is that of the initial rank, and tensors and the optimizer's moments really change their shapes.
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
"""Standard deviation of P and Q at the start, as in the authors' code."""


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method(
        name="adalora",
        config=AdaloraConfig,
        summary="LoRA that decides the rank of each layer while it trains",
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
    """A and B whose product is the update: Λ goes with A."""
    return (params["E"] * params["A"] if "E" in params else params["A"]), params["B"]


def _distance_from_one(gram: Tensor) -> Tensor:
    import torch

    return (gram - torch.eye(len(gram), device=gram.device)).square().sum()
