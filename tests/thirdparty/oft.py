"""OFT (Qiu et al. 2023, arXiv 2306.07280): the outputs of a frozen weight are rotated, in blocks.

    W' = R·W₀        R = blockdiag(R₁ … R_k),  Rᵢ = (I + Qᵢ)(I - Qᵢ)⁻¹,  Qᵢ skew-symmetric, 0 at the start

The bias is not rotated. A merge mixes rows, so it takes whole weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor

import torchgraft as tg
from torchgraft import hookimpl


class OftConfig(tg.Config):
    blocks: int = Field(1, ge=1, description="k, into how many blocks the outputs are divided")

    def advise(self, site: tg.Site) -> str:
        if site.out_features % self.blocks:
            raise tg.ConfigError(f"{site.name}: its {site.out_features} outputs cannot be divided into {self.blocks} blocks")
        return ""


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method("oft", OftConfig, "rotates the outputs of a frozen weight", "https://arxiv.org/abs/2306.07280")


@hookimpl
def adapter_shapes(site: tg.Site, config: OftConfig) -> dict[str, tuple[int, ...]]:
    size = site.out_features // config.blocks
    return {"Q": (config.blocks, size, size)}


@hookimpl
def adapter_init(site: tg.Site, config: OftConfig) -> dict[str, Tensor]:
    return {"Q": torch.zeros(adapter_shapes(site, config)["Q"])}


@hookimpl
def adapter_forward(site: tg.Site, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    h, weight = base(x), site.weight()
    return h + site.project(x, _rotated(params, weight) - weight).to(h.dtype)


@hookimpl
def adapter_merge(params: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    return _rotated(params, weight)


@hookimpl
def adapter_unmerge(params: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    return _rotated({"Q": -params["Q"]}, weight)


def _rotated(params: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """R·W; with -Q for Q, Rᵀ·W."""
    q = params["Q"].to(torch.promote_types(params["Q"].dtype, torch.float32)).triu(1)  # torch solves nothing in 16 bits
    q = q - q.mT
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    rotation = torch.linalg.solve(one - q, one + q)
    return (rotation.to(weight.dtype) @ weight.reshape(len(q), q.shape[-1], -1)).reshape(weight.shape)
