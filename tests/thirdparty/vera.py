"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): A and B are random and frozen; only their scales are trained.

    h = W₀·x + b ⊙ (B·(d ⊙ (A·x)))        A (r, in), B (out, r) frozen; d (r,) trained from 0.1, b (out,) from 0

All layers share one pair of random matrices, of which each takes the rows and columns that it needs. They are not saved: an
adapter's file has r + out numbers for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

import torchgraft as tg
from torchgraft import hookimpl


class VeraConfig(tg.Config):
    adapter_wide: ClassVar[frozenset[str]] = frozenset({"rank", "projection_seed"})

    rank: int = Field(16, ge=1, description="r, of the random matrices")
    projection_seed: int = Field(0, description="of the random matrices, the same for all layers")


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method(
        "vera", VeraConfig, "trains the scales of two frozen random matrices", "https://arxiv.org/abs/2310.11454", additive=True
    )


@hookimpl
def adapter_shared(sites: Sequence[tg.Site], config: VeraConfig) -> dict[str, Tensor]:
    """A (r, largest in) and B (largest out, r)."""
    bound, generator = config.rank**-0.5, torch.Generator().manual_seed(config.projection_seed)
    a = torch.empty(config.rank, max(site.in_features for site in sites)).uniform_(-bound, bound, generator=generator)
    b = torch.empty(max(site.out_features for site in sites), config.rank).uniform_(-bound, bound, generator=generator)
    return {"A": a, "B": b}


@hookimpl
def adapter_shapes(site: tg.Site, config: VeraConfig) -> dict[str, tuple[int, ...]]:
    return {"d": (config.rank,), "b": (site.out_features,)}


@hookimpl
def adapter_init(site: tg.Site, config: VeraConfig) -> dict[str, Tensor]:
    return {"d": torch.full((config.rank,), 0.1), "b": torch.zeros(site.out_features)}


@hookimpl
def adapter_forward(site: tg.Site, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    h = base(x)
    a, b = _factors(params, slice(None), site.in_features)
    return h + site.project_out(site.project_in(x, a), b).to(h.dtype)


@hookimpl
def adapter_merge(params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    a, b = _factors(params, rows, weight.shape[1])
    return weight.addmm(b, a)


@hookimpl
def adapter_unmerge(params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    a, b = _factors(params, rows, weight.shape[1])
    return weight.addmm(b, a, alpha=-1)


@hookimpl
def adapter_to_lora(site: tg.Site, params: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    a, b = _factors(params, slice(None), site.in_features)
    return 1.0, {"A": a, "B": b}


def _factors(params: Mapping[str, Tensor], rows: slice, width: int) -> tuple[Tensor, Tensor]:
    """diag(d)·A (r, width), and diag(b)·B (out, r) of the rows `rows`."""
    b = params["b"]
    return params["d"][:, None] * params["A"][:, :width], b[rows, None] * params["B"][: len(b)][rows]
