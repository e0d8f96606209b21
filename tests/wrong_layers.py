"""Methods that are wrong in one way each before any merge: in their start, forward pass, gradients or training hooks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

import torchgraft as tg
from tiny_methods import Base, Pair, PairConfig, Params, Scaled, scaled

WRONG: list[tuple[str, str, type]] = []
"""(the check that must fail, what its reason must say, the method)."""


def wrong(check: str, says: str) -> Callable[[type], type]:
    def add(plugin: type) -> type:
        WRONG.append((check, says, plugin))
        return plugin

    return add


@wrong("init", r"RuntimeError: no luck \(wrong_layers\.py, line \d+, in adapter_init\)")
class RaisesInInit(Scaled):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        raise RuntimeError("no luck")


@wrong("init", r"drew from torch's global generator")
class UsesTheGlobalGenerator(Pair):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site, config: PairConfig) -> dict[str, Tensor]:
        return {"A": torch.randn(config.rank, site.in_features), "B": torch.zeros(site.out_features, config.rank)}


@wrong("init", r"a second time from the same generator, is not the same")
class StartsOtherwiseEachTime(Scaled):
    def __init__(self) -> None:
        self.calls = count()

    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        return {"g": torch.full((site.out_features,), 1 + 1e-6 * next(self.calls))}


@wrong("init", r"shapes \{'g': \(20,\)\}, and adapter_shapes says \{'g': \(21,\)\}")
class NamesOtherShapes(Scaled):
    @tg.hookimpl
    def adapter_shapes(self, site: tg.Site) -> dict[str, tuple[int, ...]]:
        return {"g": (site.out_features + 1,)}


@wrong("init", "shares the memory of the frozen weight")
class KeepsTheWeightItself(Pair):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site, config: PairConfig) -> dict[str, Tensor]:
        return {"A": site.weight()[: config.rank], "B": torch.zeros(site.out_features, config.rank)}


@wrong("no_op", "the output at the start, against the base's")
class StartsElsewhere(Scaled):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        return {"g": torch.full((site.out_features,), 1.01)}


@wrong("meta", "Tensor.item")
class ReadsValuesInInit(Scaled):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        return {"g": torch.full((site.out_features,), 1.0 if site.weight().sum().item() else 0.0)}


@wrong("zero_rows", "at the start is not finite; look for a division by the norm of a row")
class DividesByTheNorm(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        norm = site.weight().norm(dim=1)
        return scaled(site, params["g"] * norm / norm, base(x))


@wrong("rank_one", r"RuntimeError: mat1 and mat2 shapes cannot be multiplied .*in adapter_forward")
class SqueezesTheRank(Pair):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        h = base(x)
        return h + site.project_out(site.project_in(x, params["A"].squeeze(0)), params["B"]).to(h.dtype)


@wrong("full_rank", "the merged layer's output with rank 12")
class StopsAtRankEight(Pair):
    @tg.hookimpl
    def adapter_merge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return weight + params["B"][rows, :8] @ params["A"][:8]


@wrong("dtype", r"bfloat16: the output is torch\.float32, and base\(x\) is torch\.bfloat16")
class AnswersInFloat32(Pair):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return base(x) + site.project_out(site.project_in(x, params["A"]), params["B"])


@wrong("dtype", r"g is torch\.bfloat16, in which small steps are lost")
class TrainsInBfloat16(Scaled):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        return {"g": torch.ones(site.out_features, dtype=getattr(torch, site.dtype))}


@wrong("input_untouched", "the input x after the forward is not the same")
class WritesToTheInput(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        h = base(x)
        with torch.no_grad():
            x.add_(1)
        return scaled(site, params["g"], h)


@wrong("input_untouched", r"base\(x\) after the forward is not the same")
class WritesToTheBasesOutput(Pair):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return base(x).add_(site.project_out(site.project_in(x, params["A"]), params["B"]))


@wrong("batch", "the output of the first entry alone")
class SubtractsTheMean(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        h = base(x)
        return scaled(site, params["g"], h - (1 - params["g"].mean()) * h.mean(0))


@wrong("batch", r"RuntimeError: .*in adapter_forward")
class CountsDimensions(Pair):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return base(x) + torch.cat([site.project_out(site.project_in(row[None], params["A"]), params["B"]) for row in x])


@wrong("modes", "the output of a second forward in eval is not the same")
class DropsInEval(Pair):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return base(x) + F.dropout(site.project_out(site.project_in(x, params["A"]), params["B"]), 0.5)


@wrong("global_state", "forward changed the state of torch's global generator")
class DrawsInForward(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return scaled(site, params["g"] + 0 * torch.rand(()), base(x))


@wrong("global_state", "attaching changed torch's default dtype")
class SetsTheDefaultDtype(Scaled):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        torch.set_default_dtype(torch.float64)
        return {"g": torch.ones(site.out_features, dtype=torch.float32)}


@wrong("disable", "the output while disabled is not the same")
class PreparesTheWeight(Scaled):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        site.stored_weight().mul_(1.01)
        return {"g": torch.full((site.out_features,), 1 / 1.01)}


@wrong("compile", "torch.compile finds no single graph")
class BranchesOnValues(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return scaled(site, params["g"] if params["g"].sum() > 0 else -params["g"], base(x))


@wrong("trains", r"the base's layer\.weight requires a gradient")
class TrainsTheBase(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        assert site.module is not None
        site.module.weight.requires_grad_(True)
        return scaled(site, params["g"], base(x))


@wrong("trains", r"layer\.g gets no gradient at the start")
class Detaches(Pair):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site, config: PairConfig, generator: Generator) -> dict[str, Tensor]:
        return {**super().adapter_init(site, config, generator), "g": torch.ones(site.out_features)}

    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return scaled(site, params["g"].detach(), super().adapter_forward(site, params, x, base))


@wrong("trains", r"the gradient of layer\.A is all zero with perturbed parameters")
class CancelsOut(Pair):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        a, b = params["A"], params["B"]
        return base(x) + site.project_out(site.project_in(x, a), 0 * b) + 0 * a.sum()


@wrong("gradients", r"the gradient of layer\.g, along a random direction and against finite differences")
class HalvesTheGradient(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return scaled(site, (params["g"] + params["g"].detach()) / 2, base(x))


@wrong("gradients", "x gets no gradient; look for a detach")
class CutsTheInput(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return scaled(site, params["g"], base(x.detach() if x.is_floating_point() else x))


@wrong("base_untouched", r"after a forward: the base's layer\.weight is not the same to the last bit")
class WritesToTheWeight(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        site.stored_weight().mul_(1.001)
        return scaled(site, params["g"], base(x))


@wrong("base_untouched", r"after attaching: the base's layer\.bias is gone")
class TakesTheBias(Scaled):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        if site.bias is not None:
            site.module.bias = None  # type: ignore[union-attr]
        return {"g": torch.ones(site.out_features)}


@wrong("param_groups", "B is 0 times in the parameter groups of pair")
class LeavesOutB(Pair):
    @tg.hookimpl
    def adapter_param_groups(self, adapter: tg.Adapter, lr: float) -> list[dict[str, Any]]:
        return [{"params": [p for name, p in adapter.named_parameters() if name.endswith("A")], "lr": lr}]


@wrong("param_groups", "with lr = 0.125 and 0.25 a group has 0.001 and 0.001")
class HasARateOfItsOwn(Pair):
    @tg.hookimpl
    def adapter_param_groups(self, adapter: tg.Adapter) -> list[dict[str, Any]]:
        return [{"params": adapter.parameters(), "lr": 1e-3}]


@wrong("modes", "the output after the frozen weight was changed")
class CachesTheWeight(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        scale = site.cached("size", [params["g"]], lambda: site.weight().abs().mean())
        return scaled(site, params["g"] * scale, base(x))


@wrong("additive", r"the merged bias, against b \+ merge_bias\(0\)")
class ScalesTheBiasAndClaimsToAdd(Pair):
    @tg.hookimpl
    def adapter_merge_bias(self, params: Params, bias: Tensor) -> Tensor:
        return bias * params["B"].sum(1)


@wrong("steps", r"layer\.B after step 7 is not finite")
class DividesByZeroOnce(Pair):
    @tg.hookimpl
    def adapter_step(self, adapter: tg.Adapter, step: int) -> None:
        with torch.no_grad():
            adapter.parameters()[1].div_(step - 7)


@wrong("steps", r"adapter_penalty returns a tensor of shape \(3,\)")
class PenalisesEachDirection(Pair):
    @tg.hookimpl
    def adapter_penalty(self, params: Params) -> Tensor:
        return params["B"].square().sum(0)
