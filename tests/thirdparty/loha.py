"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098): the elementwise product of two low-rank updates, of rank up to r².

h = W₀·x + s·((B₁·A₁) ⊙ (B₂·A₂))·x        A₁, A₂ (r, in), B₁, B₂ (out, r), s = α/r; B₂ = 0 at the start
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Generator, Tensor

import torchgraft as tg
from torchgraft import hookimpl


class LohaConfig(tg.Config):
    rank: int = Field(4, ge=1, description="r, of each of the two products")
    alpha: float = Field(4.0, gt=0, description="α; the update is scaled with α/r")


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method(
        "loha", LohaConfig, "adds the elementwise product of two low-rank updates", "https://arxiv.org/abs/2108.06098", additive=True
    )


@hookimpl
def adapter_shapes(site: tg.Site, config: LohaConfig) -> dict[str, tuple[int, ...]]:
    a, b = (config.rank, site.in_features), (site.out_features, config.rank)
    return {"A1": a, "B1": b, "A2": a, "B2": b}


@hookimpl
def adapter_init(site: tg.Site, config: LohaConfig, generator: Generator) -> dict[str, Tensor]:
    tensors = {name: torch.empty(shape).normal_(0, 0.1, generator=generator) for name, shape in adapter_shapes(site, config).items()}
    return {**tensors, "B2": torch.zeros_like(tensors["B2"])}


@hookimpl
def adapter_forward(site: tg.Site, config: LohaConfig, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    h = base(x)
    return h + site.project(x, _change(config, params, slice(None))).to(h.dtype)


@hookimpl
def adapter_merge(config: LohaConfig, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    return weight + _change(config, params, rows)


@hookimpl
def adapter_unmerge(config: LohaConfig, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    return weight - _change(config, params, rows)


def _change(config: LohaConfig, params: Mapping[str, Tensor], rows: slice) -> Tensor:
    """ΔW, of the rows `rows`."""
    one, other = params["B1"][rows] @ params["A1"], params["B2"][rows] @ params["A2"]
    return config.alpha / config.rank * one * other
