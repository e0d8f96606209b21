"""Two small methods that are right, to be spoiled one hook at a time. `Scaled` depends on the weight, `Pair` adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

import torchgraft as tg

Base = Callable[[Tensor], Tensor]
Params = Mapping[str, Tensor]


class Scaled:
    """W' = diag(g)·W with g (out,), which starts at 1."""

    name = "scaled"
    claims: ClassVar[Mapping[str, Any]] = {}
    """What the method says of itself beside its name."""

    @tg.hookimpl
    def adapter_method(self) -> tg.Method:
        return tg.Method(**{"name": self.name, "config": tg.Config, "summary": "scales rows", "reference": "", **self.claims})

    @tg.hookimpl
    def adapter_shapes(self, site: tg.Site) -> dict[str, tuple[int, ...]]:
        return {"g": (site.out_features,)}

    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        return {"g": torch.ones(site.out_features)}

    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return scaled(site, params["g"], base(x))

    @tg.hookimpl
    def adapter_merge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return params["g"][rows, None] * weight

    @tg.hookimpl
    def adapter_undo(self, weight: Tensor, rows: slice) -> dict[str, Tensor]:
        return {"size": weight.abs().amax(1)}

    @tg.hookimpl
    def adapter_unmerge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        g = params["g"][rows, None]
        return weight / g.where(g != 0, 1)


def scaled(site: tg.Site, g: Tensor, h: Tensor) -> Tensor:
    """The output of a layer whose weight's rows are scaled and whose bias is not."""
    bias = torch.zeros(()) if site.bias is None else site.broadcast(site.bias)
    return ((h - bias) * site.broadcast(g) + bias).to(h.dtype)


class PairConfig(tg.Config):
    rank: int = 3


class Pair:
    """W' = W + B·A, with all that such a method can claim: A (r, in), B (out, r)."""

    name = "pair"

    @tg.hookimpl
    def adapter_method(self) -> tg.Method:
        return tg.Method(self.name, PairConfig, "", "", roles={"A": "A", "B": "B"}, additive=True)

    @tg.hookimpl
    def adapter_init(self, site: tg.Site, config: PairConfig, generator: Generator) -> dict[str, Tensor]:
        a = torch.randn(config.rank, site.in_features, generator=generator)
        return {"A": a / site.in_features**0.5, "B": torch.zeros(site.out_features, config.rank)}

    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        h = base(x)
        return h + site.project_out(site.project_in(x, params["A"]), params["B"]).to(h.dtype)

    @tg.hookimpl
    def adapter_merge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return weight + params["B"][rows] @ params["A"]

    @tg.hookimpl
    def adapter_unmerge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return weight - params["B"][rows] @ params["A"]

    @tg.hookimpl
    def adapter_to_lora(self, params: Params) -> tuple[float, dict[str, Tensor]]:
        return 0.5, {"A": 2 * params["A"], "B": params["B"]}

    @tg.hookimpl
    def adapter_param_groups(self, adapter: tg.Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": adapter.parameters(), "lr": 2 * lr, "weight_decay": weight_decay}]

    @tg.hookimpl
    def adapter_penalty(self, params: Params) -> Tensor:
        return 0.01 * params["B"].square().sum()

    @tg.hookimpl
    def adapter_step(self, adapter: tg.Adapter, step: int) -> None:
        adapter.state["step"] = step


class OnLinears(Scaled):
    """Quickly checked."""

    claims: ClassVar = {"kinds": frozenset({"Linear"})}


class Spoiled(OnLinears):
    @tg.hookimpl
    def adapter_merge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return 2 * weight


@contextmanager
def registered(plugin: Any) -> Iterator[str]:
    """The name under which the plugin is installed within the block."""
    tg.registry().register(plugin, plugin.name)
    try:
        yield plugin.name
    finally:
        tg.registry().unregister(plugin.name)
