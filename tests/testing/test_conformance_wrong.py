"""The conformance kit finds what is wrong: for every check, methods that are right but for one thing, and what it says of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import torchgraft as tg
from tiny_methods import Base, Pair, PairConfig, Params, Scaled, registered, scaled

WRONG: list[tuple[str, str, type]] = []
"""(the check that must fail, what its reason must say, the method)."""


def wrong(check: str, says: str) -> Callable[[type], type]:
    def add(plugin: type) -> type:
        WRONG.append((check, says, plugin))
        return plugin

    return add


@wrong("init", r"RuntimeError: no luck \(test_conformance_wrong\.py, line \d+, in adapter_init\)")
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


@wrong("dtype", r"g is torch\.bfloat16: small steps are lost in it")
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


@wrong("param_groups", "B is 0 times in the parameter groups that pair makes")
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


@wrong("steps", r"adapter_penalty gives a tensor of shape \(3,\)")
class PenalisesEachDirection(Pair):
    @tg.hookimpl
    def adapter_penalty(self, params: Params) -> Tensor:
        return params["B"].square().sum(0)


@wrong("merge", r"bias=False.*: the merged layer's output, against the forward before: expected .*the same scale")
class MergesAtAnotherScale(Pair):
    @tg.hookimpl
    def adapter_merge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return weight + 1.01 * params["B"][rows] @ params["A"]


@wrong("merge", "the output does not change when every trained parameter does")
class DoesNothing(Scaled):
    @tg.hookimpl
    def adapter_forward(self, params: Params, x: Tensor, base: Base) -> Tensor:
        return base(x)


@wrong("bias", "does forward treat the bias in base.x. as the merged layer will")
class ForgetsTheBias(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return (base(x) * site.broadcast(params["g"])).to(base(x).dtype)


class ScalesTheBias(ForgetsTheBias):
    """Right: forward scales the bias, and the merge does so, too."""

    @tg.hookimpl
    def adapter_merge_bias(self, params: Params, bias: Tensor) -> Tensor:
        return params["g"] * bias


@wrong("bias", "the merged layer's output, against the forward before")
class ScalesTheBiasTwice(ScalesTheBias):
    @tg.hookimpl
    def adapter_merge_bias(self, params: Params, bias: Tensor) -> Tensor:
        return params["g"] ** 2 * bias


@wrong("pure", "adapter_merge_bias changed `bias` in place")
class ScalesTheBiasInPlace(ScalesTheBias):
    @tg.hookimpl
    def adapter_merge_bias(self, params: Params, bias: Tensor) -> Tensor:
        return bias.mul_(params["g"])


@wrong("unmerge", r"NotImplementedError: .*in adapter_unmerge")
class CannotUnmerge(Scaled):
    @tg.hookimpl
    def adapter_unmerge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        raise NotImplementedError("later")


@wrong("quantized", r"Linear4bit.*: RuntimeError: The size of tensor a \(32\) must match .*in adapter_forward")
class MultipliesTheCodes(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        assert site.module is not None
        return F.linear(x, params["g"][:, None] * site.module.weight, site.bias)


@wrong("files", "the output of the checkpoint that was merged on files")
class SavesHalf(Pair):
    class Halved(tg.LowRankPeft):
        def to_tensors(self, site: tg.Site, config: Any, params: Params, default: Any) -> dict[str, Tensor]:
            return super().to_tensors(site, config, {**params, "B": params["B"] / 2}, default)

        def document(self, sites: Any, default: Any) -> dict[str, Any]:
            return {"peft_type": "PAIR", "r": default.rank, "lora_alpha": default.rank}

        def from_config(self, peft: Any, site: tg.Site | None = None) -> PairConfig | None:
            return None

        def _peft_rank(self, site: tg.Site, config: Any) -> int:
            return int(config.rank) * site.groups

    class HalvedConfig(PairConfig):
        init: str = "kaiming"

    @tg.hookimpl
    def adapter_method(self) -> tg.Method:
        return tg.Method(self.name, self.HalvedConfig, "", "", additive=True, peft=self.Halved(claims=False))


@wrong("rows", "adapter_merge of rows 1 to 7 of 20")
class TakesTheFirstRows(Scaled):
    @tg.hookimpl
    def adapter_merge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return params["g"][: len(weight), None] * weight


@wrong("rows", r"adapter_merge returned a tensor of shape \[20, 12\], where \[1, 12\] is expected")
class IgnoresRows(Pair):
    @tg.hookimpl
    def adapter_merge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return weight + params["B"] @ params["A"]


@wrong("rows", "adapter_undo's size of rows 0 to 1 of 20")
class KeepsWhatOtherRowsSay(Scaled):
    @tg.hookimpl
    def adapter_undo(self, weight: Tensor, rows: slice) -> dict[str, Tensor]:
        return {"size": weight.abs().amax(1) + weight.abs().amax()}


@wrong("unmerge", "the weight that adapter_unmerge gives back: expected")
class MultipliesAgain(Scaled):
    @tg.hookimpl
    def adapter_unmerge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return weight * params["g"][rows, None]


@wrong("pure", "adapter_merge changed `weight` in place")
class MergesInPlace(Scaled):
    @tg.hookimpl
    def adapter_merge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return weight.mul_(params["g"][rows, None])


@wrong("pure", r"adapter_merge returned \(20, 12\) of torch\.float32")
class MergesInFloat32(Scaled):
    @tg.hookimpl
    def adapter_merge(self, params: Params, weight: Tensor, rows: slice) -> Tensor:
        return (params["g"][rows, None] * weight).float()


@wrong("additive", r"the merged weight, against W \+ merge\(0\)")
class OnlyClaimsToAdd(Scaled):
    claims: ClassVar = {"additive": True}


@wrong("to_lora", r"W \+ s·B·A, against adapter_merge")
class FoldsAtAnotherScale(Pair):
    @tg.hookimpl
    def adapter_to_lora(self, params: Params) -> tuple[float, dict[str, Tensor]]:
        return 2.0, {"A": params["A"], "B": params["B"]}


@wrong("two_adapters", "the output with 'one' alone active")
class KeepsOneForEachLayer(Scaled):
    def __init__(self) -> None:
        self.first: dict[nn.Module | None, Tensor] = {}

    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return scaled(site, self.first.setdefault(site.module, params["g"]), base(x))


@wrong("save_load", "the output after saving and loading is not the same")
class KeepsADirectionElsewhere(Scaled):
    def __init__(self) -> None:
        self.directions: dict[str, Tensor] = {}

    @tg.hookimpl
    def adapter_init(self, site: tg.Site, generator: Generator) -> dict[str, Tensor]:
        self.directions[site.name] = torch.randn(site.out_features, generator=generator)
        return {"g": torch.zeros(site.out_features)}

    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return scaled(site, 1 + params["g"] * self.directions[site.name], base(x))


@wrong("cast", r"RuntimeError: .*dtype.*in adapter_forward")
class KeepsAMatrixElsewhere(Pair):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        update = site.project_out(site.project_in(x, params["A"]), params["B"])
        return base(x) + (update @ torch.eye(update.shape[-1])).to(base(x).dtype)


@wrong("state_dict", r"has the new keys \['layer\.adapters\.default\.g', 'layer\.seen'\]")
class CountsOnTheLayer(Scaled):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        if site.module is not None:
            site.module.register_buffer("seen", torch.zeros(1))
        return {"g": torch.ones(site.out_features)}


@wrong("copies", "KeyError: 'direction'")
class KeepsADirectionInTheMemo(Scaled):
    @tg.hookimpl
    def adapter_init(self, site: tg.Site, generator: Generator) -> dict[str, Tensor]:
        site.memo["direction"] = torch.randn(site.out_features, generator=generator)
        return {"g": torch.zeros(site.out_features)}

    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return scaled(site, 1 + params["g"] * site.memo["direction"], base(x))


@wrong("names", "the merged output: expected")
class GoesByNames(Scaled):
    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Params, x: Tensor, base: Base) -> Tensor:
        return base(x) if "lora" in site.name else scaled(site, params["g"], base(x))


@pytest.mark.parametrize(("check", "says", "plugin"), WRONG, ids=[f"{check}-{plugin.__name__}" for check, _, plugin in WRONG])
def test_the_check_finds_it(check: str, says: str, plugin: Callable[[], Any]) -> None:
    state = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state()
    with registered(plugin()) as name:
        (result,) = tg.testing.run_checks(name, only=[check]).checks
    assert (result.name, result.outcome) == (check, "failed")
    assert re.search(says, result.reason), result.reason
    assert torch.get_default_dtype() == state[0]
    assert torch.is_grad_enabled() == state[1]
    assert torch.get_rng_state().equal(state[2])


def test_every_check_is_seen_to_fail() -> None:
    assert {check for check, _, _ in WRONG} == set(tg.testing.CHECKS)


def test_a_method_that_scales_the_bias_passes() -> None:
    with registered(ScalesTheBias()) as name:
        assert tg.testing.check_plugin(name, only=["bias", "pure", "unmerge", "files", "two_adapters", "quantized", "dtype"]).skipped == 0
