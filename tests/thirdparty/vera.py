"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): A and B are random and frozen; only their scales are trained.

    h = W₀·x + b ⊙ (B·(d ⊙ (A·x)))        A (r, in), B (out, r) frozen; d (r,) trained from 0.1, b (out,) from 0

All layers share one pair of random matrices, of which each takes the rows and columns that it needs: they depend on the
adapter's `projection_seed` alone, so a site's own generator is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

import torchgraft as tg
from torchgraft import hookimpl


class VeraConfig(tg.Config):
    adapter_wide: ClassVar[frozenset[str]] = frozenset({"projection_seed"})

    rank: int = Field(16, ge=1, description="r, of the random matrices")
    projection_seed: int = Field(0, description="of the random matrices, the same for all layers")


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method(
        "vera",
        VeraConfig,
        "trains the scales of two frozen random matrices",
        "https://arxiv.org/abs/2310.11454",
        buffers=frozenset({"A", "B"}),
        additive=True,
    )


@hookimpl
def adapter_shapes(site: tg.Site, config: VeraConfig) -> dict[str, tuple[int, ...]]:
    rank = config.rank
    return {"A": (rank, site.in_features), "B": (site.out_features, rank), "d": (rank,), "b": (site.out_features,)}


@hookimpl
def adapter_init(site: tg.Site, config: VeraConfig) -> dict[str, Tensor]:
    """Drawn column by column of A and row by row of B: a larger layer's begin with a smaller one's."""
    bound = config.rank**-0.5
    generators = [torch.Generator().manual_seed(2 * config.projection_seed + number) for number in range(2)]
    columns, b = (
        torch.empty(size, config.rank).uniform_(-bound, bound, generator=generator)
        for size, generator in zip((site.in_features, site.out_features), generators, strict=True)
    )
    return {"A": columns.t().contiguous(), "B": b, "d": torch.full((config.rank,), 0.1), "b": torch.zeros(site.out_features)}


@hookimpl
def adapter_forward(site: tg.Site, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    h = base(x)
    a, b = _factors(params, slice(None))
    return h + site.project_out(site.project_in(x, a), b).to(h.dtype)


@hookimpl
def adapter_merge(params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    a, b = _factors(params, rows)
    return weight.addmm(b, a)


@hookimpl
def adapter_unmerge(params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    a, b = _factors(params, rows)
    return weight.addmm(b, a, alpha=-1)


@hookimpl
def adapter_to_lora(params: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    a, b = _factors(params, slice(None))
    return 1.0, {"A": a, "B": b}


def _factors(params: Mapping[str, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    """diag(d)·A (r, in), and diag(b)·B (out, r) of the rows `rows`."""
    return params["d"][:, None] * params["A"], params["b"][rows, None] * params["B"][rows]
