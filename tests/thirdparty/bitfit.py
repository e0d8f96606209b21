"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): only biases are trained.

h = W₀·x + b₀ + Δb        Δb (out,), 0 at the start
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import torchgraft as tg
from torchgraft import hookimpl


class BitFitConfig(tg.Config):
    def advise(self, site: tg.Site) -> str:
        if not site.has_bias:
            raise tg.ConfigError(f"{site.name}: it has no bias to train; select layers that have one")
        return ""


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method("bitfit", BitFitConfig, "trains the biases", "https://arxiv.org/abs/2106.10199", additive=True)


@hookimpl
def adapter_shapes(site: tg.Site) -> dict[str, tuple[int, ...]]:
    return {"delta": (site.out_features,)}


@hookimpl
def adapter_init(site: tg.Site) -> dict[str, Tensor]:
    return {"delta": torch.zeros(site.out_features)}


@hookimpl
def adapter_forward(site: tg.Site, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    h = base(x)
    return h + site.broadcast(params["delta"]).to(h.dtype)


@hookimpl
def adapter_merge_bias(params: Mapping[str, Tensor], bias: Tensor) -> Tensor:
    return bias + params["delta"]
