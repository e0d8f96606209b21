"""The conformance kit finds what is wrong: for every check, methods that are right but for one thing, and what it says of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import torchgraft as tg
from references import UNTRIED
from tiny_methods import Base, Pair, PairConfig, Params, Scaled, registered, scaled
from wrong_layers import WRONG, wrong


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


@wrong("unmerge", "the weight that adapter_unmerge returns: expected")
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
    if check in UNTRIED:
        pytest.skip("the installed torch is too old")
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
