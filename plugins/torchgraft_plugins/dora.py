"""DoRA (Liu et al. 2024, arXiv 2402.09353): the weight is split into magnitude and direction, and LoRA changes the direction.

    W' = m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖        m (out,): one magnitude and one norm per output row

m starts at ‖W₀‖, so that training starts from the pretrained model. As in the paper's §4.3, the norm is detached from the graph.
Neither B·A nor W' is ever built in forward: with V = W₀ + s·B·A and g = m / ‖V‖,

    h = g·(W₀·x + s·B·A·x)
    ‖V‖² = ‖W₀‖² + 2s·⟨W₀·Aᵀ, B⟩ + s²·⟨B·(A·Aᵀ), B⟩        row by row

With dropout, the whole change sees the dropped input, as in the authors' code: h = W₀·x + (W' - W₀)·drop(x). A row of W₀
that is all zero has no direction; there g = 1 until V has one, so that B can train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torchgraft as tg
from torchgraft import hookimpl

if TYPE_CHECKING:
    from torch import Generator, Tensor


class DoraPeft(tg.LowRankPeft):
    """PEFT's LORA type with use_dora: one more tensor, lora_magnitude_vector, of shape (out,), or (1, out, 1…) for a convolution."""

    def document(self, sites: Sequence[tuple[tg.Site, tg.LowRankConfig]], default: tg.LowRankConfig) -> dict[str, Any]:
        return {**super().document(sites, default), "use_dora": True}

    def from_config(self, peft: Mapping[str, Any], site: tg.Site | None = None) -> tg.LowRankConfig | None:
        if not peft.get("use_dora"):
            return None
        return super().from_config({**peft, "use_dora": False}, site)

    def shapes(self, site: tg.Site, config: tg.LowRankConfig) -> dict[str, tuple[int, ...]]:
        kernel = site.kind.dimensions
        magnitude = (1, site.out_features, *(1,) * kernel) if kernel else (site.out_features,)
        return {**super().shapes(site, config), "lora_magnitude_vector": magnitude}

    def to_tensors(
        self, site: tg.Site, config: tg.LowRankConfig, params: Mapping[str, Tensor], default: tg.LowRankConfig
    ) -> dict[str, Tensor]:
        magnitude = params["m"].reshape(self.shapes(site, config)["lora_magnitude_vector"])
        return {**super().to_tensors(site, config, params, default), "lora_magnitude_vector": magnitude}

    def from_tensors(
        self, site: tg.Site, config: tg.LowRankConfig, tensors: Mapping[str, Tensor], default: tg.LowRankConfig
    ) -> dict[str, Tensor]:
        return {**super().from_tensors(site, config, tensors, default), "m": tensors["lora_magnitude_vector"].reshape(-1)}


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method(
        name="dora",
        config=tg.LowRankConfig,
        summary="trains the magnitude and, by LoRA, the direction of each weight row",
        reference="https://arxiv.org/abs/2402.09353",
        buffers=frozenset({"A0", "B0"}),
        roles={"A": "A", "B": "B", "m": "magnitude"},
        partial_gradients=frozenset({"A", "B"}),
        peft=DoraPeft(),
    )


@hookimpl
def adapter_shapes(site: tg.Site, config: tg.LowRankConfig) -> dict[str, tuple[int, ...]]:
    return {**tg.factor_shapes(site, config), "m": (site.out_features,)}


@hookimpl
def adapter_init(site: tg.Site, config: tg.LowRankConfig, generator: Generator) -> dict[str, Tensor]:
    """Create A, B and m. m is in float32 (float64) whatever the config's dtype, because a rounded m would change the model's output."""
    factors = tg.init_factors(site, config, generator)
    weight = site.weight()
    return {**factors, "m": _squared_norm(weight).sqrt().to(factors["A"].device, weight.dtype)}


@hookimpl
def adapter_forward(
    site: tg.Site, config: tg.LowRankConfig, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]
) -> Tensor:
    a, b = tg.factors(params)
    dropped = site.dropout(x, config.dropout)
    if dropped is x:  # also for an Embedding: its input cannot be dropped, only the columns looked up in A
        stored = site.weight_for_product(x, base)
        return site.low_rank(x, base, a, b, config.scale, config.dropout, _gain(site, config, params, stored), stored)
    h, g, plain = base(x), site.broadcast(_gain(site, config, params)), base(dropped)
    if site.bias is not None:
        plain = plain - site.broadcast(site.bias)
    update = site.project_out(site.project_in(dropped, a), b)
    return h + ((g - 1) * plain + g * config.scale * update).to(h.dtype)


@hookimpl
def adapter_merge(config: tg.LowRankConfig, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    v = _direction(config, params, weight, rows)
    return _exact_ratio(params["m"][rows], _squared_norm(v).sqrt()).to(v.dtype)[:, None] * v


@hookimpl
def adapter_undo(config: tg.LowRankConfig, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> dict[str, Tensor]:
    """Return ‖V‖, by which the merge divided and which W' does not contain."""
    return {"norm": _squared_norm(_direction(config, params, weight, rows)).sqrt()}


@hookimpl
def adapter_unmerge(config: tg.LowRankConfig, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    g = _exact_ratio(params["m"][rows], params["norm"][rows]).to(weight.dtype)
    a, b = tg.factors(params)
    return (weight / g.where(g != 0, 1)[:, None]).addmm(b[rows], a, alpha=-config.scale)


@hookimpl
def adapter_param_groups(adapter: tg.Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    return tg.scaled_param_groups(adapter, lr, weight_decay)


def _direction(config: tg.LowRankConfig, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    """Return the rows `rows` of V = W₀ + s·B·A."""
    a, b = tg.factors(params)
    return weight.addmm(b[rows], a, alpha=config.scale)


def _gain(site: tg.Site, config: tg.LowRankConfig, params: Mapping[str, Tensor], stored: Tensor | None = None) -> Tensor:
    """Return g = m / ‖V‖ (out,), with a gradient only for m."""
    tensors = [*params.values(), *site.weight_tensors()]
    return site.cached(f"gain at {config.scale}", tensors, lambda: _ratio(params["m"], _norm(site, config, params, stored)))


def _norm(site: tg.Site, config: tg.LowRankConfig, params: Mapping[str, Tensor], stored: Tensor | None = None) -> Tensor:
    """Return ‖W₀ + s·B·A‖ per row, without building B·A.

    Args:
        stored: the stored weight W₀, if it is already loaded.
    """
    import torch

    s, wide = config.scale, torch.promote_types(params["m"].dtype, torch.float32)
    a, b = (factor.detach().to(wide) for factor in tg.factors(params))
    with torch.autocast("cpu" if a.is_meta else a.device.type, enabled=False):  # torch has no autocast for the meta device
        along = torch.cat([rows.to(wide) @ a.T for rows in site.weight_blocks(stored)])
        frozen = site.cached("squared norm", site.weight_tensors(), lambda: torch.cat([*map(_squared_norm, site.weight_blocks(stored))]))
        change = along.addmm(b, a @ a.T, beta=2 * s, alpha=s * s)
        squared: Tensor = frozen + torch.linalg.vecdot(change, b)
        return squared.clamp(min=0).sqrt().to(wide)


def _squared_norm(weight: Tensor) -> Tensor:
    """Return the squared norm of each row, in float64, so that m and every later norm of W₀ round to the same bits."""
    import torch

    size = len(weight) if weight.is_meta else 512
    return torch.cat([rows.double().square().sum(1) for rows in torch.split(weight, size)])


def _exact_ratio(m: Tensor, norm: Tensor) -> Tensor:
    """Return m / norm in float64, for a merge; exactly 1 where both are equal in float32, the dtype of m."""
    return _ratio(m.double(), norm.double()).masked_fill(m.float() == norm.float(), 1)


def _ratio(m: Tensor, norm: Tensor) -> Tensor:
    """Return m / norm; 1 where the norm is 0."""
    zero = norm == 0
    return (m / norm.masked_fill(zero, 1)).masked_fill(zero, 1)
