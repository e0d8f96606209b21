"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen weight W₀ and a trained update of rank r.

    h = W₀·x + s·B·A·x        A (r, in), B (out, r), s = α/r

Training starts from the pretrained model, because B = 0. It trains r·(out + in) parameters instead of out·in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torchgraft as tg
from torchgraft import hookimpl

if TYPE_CHECKING:
    from torch import Generator, Tensor


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method(
        name="lora",
        config=tg.LowRankConfig,
        summary="adds a product of two thin matrices, s·B·A, to a frozen weight",
        reference="https://arxiv.org/abs/2106.09685",
        buffers=frozenset({"A0", "B0"}),
        roles={"A": "A", "B": "B"},
        additive=True,
        peft=tg.LowRankPeft(),
    )


@hookimpl
def adapter_shapes(site: tg.Site, config: tg.LowRankConfig) -> dict[str, tuple[int, ...]]:
    return tg.factor_shapes(site, config)


@hookimpl
def adapter_init(site: tg.Site, config: tg.LowRankConfig, generator: Generator) -> dict[str, Tensor]:
    return tg.init_factors(site, config, generator)


@hookimpl
def adapter_forward(
    site: tg.Site, config: tg.LowRankConfig, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]
) -> Tensor:
    a, b = tg.factors(params)
    return site.low_rank(x, base, a, b, config.scale, config.dropout)


@hookimpl
def adapter_merge(config: tg.LowRankConfig, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    a, b = tg.factors(params)
    return weight.addmm(b[rows], a, alpha=config.scale)


@hookimpl
def adapter_unmerge(config: tg.LowRankConfig, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    a, b = tg.factors(params)
    return weight.addmm(b[rows], a, alpha=-config.scale)


@hookimpl
def adapter_param_groups(adapter: tg.Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    return tg.scaled_param_groups(adapter, lr, weight_decay)


@hookimpl
def adapter_to_lora(site: tg.Site, config: tg.LowRankConfig, params: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    a, b = tg.factors(params)
    return config.scale, {"A": a, "B": b}
