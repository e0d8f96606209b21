"""The conformance kit: methods that are right pass it, and its report says what was checked, and what was not, and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from references import UNTRIED
from tiny_methods import OnLinears, Pair, Scaled, registered
from torchgraft.kinds.dense import Linear

BUNDLED = ("adalora", "dora", "lora", "loraplus", "qlora")
UNCLAIMED = {
    "adalora": set(),
    "dora": {"steps", "additive", "to_lora"},
    "lora": {"steps"},
    "loraplus": {"steps"},
    "qlora": {"steps", "meta", "gradients"},  # its weight has no values there, and bitsandbytes no float64
    "scaled": {"param_groups", "rank_one", "full_rank", "steps", "additive", "to_lora"},
    "pair": set(),
}
"""What each method does not claim; all else must have run."""
NOTHING = "no core check ran, so the method is untested"
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("adalora", {"allocator": "budget", "total_steps": 60, "interval": 5}),
    ("adalora", {"interval": 5, "epsilon": 0.2}),
    ("lora", {"init": "pissa", "rank": 4}),
    ("lora", {"dtype": "bfloat16"}),
    ("dora", {"init": "pissa", "rank": 4}),
    ("dora", {"dtype": "bfloat16", "init": "swapped", "scaling": "none"}),
    ("dora", {"dropout": 0.2}),
    ("qlora", {"compute_dtype": "float32", "quant_type": "fp4"}),
]


def skipped(report: tg.testing.Report) -> set[str]:
    """Checks that were skipped, without those that the installed torch cannot pass."""
    return {result.name for result in report.checks if result.outcome == "skipped"} - UNTRIED


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_method_conforms(name: str) -> None:
    report = tg.testing.check_plugin(name)
    print(report)
    assert [result.name for result in report.checks] == list(tg.testing.CHECKS)
    assert (report.failed, report.notes) == (0, ())
    assert skipped(report) == UNCLAIMED[name]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_bundled_method_conforms_with_other_options(name: str, options: dict[str, Any]) -> None:
    report = tg.testing.check_plugin(name, options=options)
    assert skipped(report) <= {*UNCLAIMED[name], "meta"}


@pytest.mark.parametrize("plugin", [Scaled(), Pair()], ids=lambda plugin: plugin.name)
def test_method_that_the_wrong_ones_are_made_of_conforms(plugin: Any) -> None:
    with registered(plugin) as name:
        report = tg.testing.check_plugin(name)
    assert skipped(report) == UNCLAIMED[name]


def test_report_has_the_counts_and_every_reason(spoiled: str) -> None:
    report = tg.testing.run_checks(spoiled, only=["init", "merge", "additive"])
    assert [(result.name, result.outcome) for result in report.checks] == [("init", "passed"), ("additive", "skipped"), ("merge", "failed")]
    assert (report.passed, report.failed, report.skipped, report.ok) == (1, 1, 1, False)
    first, failed, left_out = str(report).splitlines()
    assert first == "scaled: 1 passed, 1 failed, 1 skipped"
    assert failed.startswith(
        "failed  merge: Linear(in_features=20, out_features=12, bias=False), float32: the merged layer's output, against "
        "the forward before: expected "
    )
    assert left_out == "skipped  additive: not claimed: additive"
    with pytest.raises(tg.ConformanceError) as caught:
        tg.testing.check_plugin(spoiled, only=["init", "merge", "additive"])
    assert str(caught.value) == str(report)
    assert isinstance(caught.value, AssertionError)


def test_kinds_that_are_not_claimed_are_not_tried(linears: str) -> None:
    report = tg.testing.check_plugin(linears)
    reasons = {result.name: (result.outcome, result.reason) for result in report.checks}
    assert reasons["init"] == ("passed", "12 cases")
    assert reasons["merge"] == ("passed", "6 cases")
    assert reasons["quantized"] == ("skipped", "not claimed: a quantized layer")


def test_expected_failure_is_skipped_with_its_reason_and_must_fail(spoiled: str) -> None:
    why = {"merge": "the merge is not written yet"}
    report = tg.testing.check_plugin(spoiled, only=["init", "merge"], expected_failures=why)
    assert (report.passed, report.failed, report.skipped, report.ok) == (1, 0, 1, True)
    assert str(report).splitlines()[1:] == ["skipped  merge: expected failure: the merge is not written yet"]
    report = tg.testing.run_checks(spoiled, only=["init", "merge"], expected_failures={**why, "init": "it draws", "additive": "no"})
    assert [result.outcome for result in report.checks] == ["failed", "skipped"]
    assert report.checks[0].reason == "it passes, and is expected to fail (it draws): take it out of expected_failures"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"expected_failures": {"merge": " "}}, "expected_failures: merge: say why it fails"),
        ({"expected_failures": {"merging": "no"}}, "there is no check 'merging'.*merge.*the checks are init, no_op"),
        ({"only": ["mergee"]}, "there is no check 'mergee'.*near names: merge"),
        ({"only": "nope"}, "there is no check 'nope'"),
        ({"options": {"rank": 4}}, "scaled has no option 'rank'"),
    ],
)
def test_mistake_in_the_call_is_refused(linears: str, arguments: dict[str, Any], says: str) -> None:
    for run in (tg.testing.run_checks, tg.testing.check_plugin):
        with pytest.raises(tg.ConfigError, match=says):
            run(linears, **arguments)
    if "options" not in arguments:
        with pytest.raises(tg.ConfigError, match=says):
            tg.testing.conformance(linears, **arguments)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(tg.PluginError, match="there is no plugin 'lorra'"):
        tg.testing.run_checks("lorra")


class NowhereConfig(tg.Config):
    def advise(self, site: tg.Site) -> str:
        raise tg.ConfigError("nowhere")


class Nowhere(OnLinears):
    claims: ClassVar = {"kinds": frozenset({"Linear"}), "config": NowhereConfig}


def test_only_skips_are_no_pass() -> None:
    with registered(Nowhere()) as name:
        report = tg.testing.run_checks(name)
        assert {result.outcome for result in report.checks} == {"skipped"}
        assert not report.ok
        assert report.checks[0].reason == "refused by the method: nowhere"
        assert str(report).startswith(
            f"scaled: 0 passed, 0 failed, {len(report.checks)} skipped: no core check ran, so the method is untested\n"
        )
        with pytest.raises(tg.ConformanceError, match="the method is untested"):
            tg.testing.check_plugin(name)


def test_core_checks_that_are_all_expected_to_fail_are_no_pass(spoiled: str) -> None:
    report = tg.testing.run_checks(spoiled, only=["merge", "pure"], expected_failures={"merge": "later"})
    assert [result.outcome for result in report.checks] == ["passed", "skipped"]
    assert not report.ok
    assert tg.testing.run_checks(spoiled, only=["pure"]).ok


class Wavering(OnLinears):
    claims: ClassVar = {"kinds": frozenset({"Linear"}), "starts_unchanged": False, "compiles": False, "partial_gradients": frozenset({"g"})}

    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        return {"g": torch.full((site.out_features,), 1.5)}

    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: dict[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        g = params["g"] if params["g"].sum() > 0 else -params["g"]
        return super().adapter_forward(site, {"g": (g + g.detach()) / 2}, x, base)


def test_what_is_not_claimed_is_not_asked_for() -> None:
    with registered(Wavering()) as name:
        report = tg.testing.check_plugin(name)
    reasons = {result.name: (result.outcome, result.reason) for result in report.checks}
    assert reasons["no_op"] == ("skipped", "not claimed: starts_unchanged")
    assert reasons["compile"] == ("skipped", "not claimed: compiles")
    assert reasons["gradients"] == ("passed", "4 cases"), "of x it is still asked for"


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledKind(tg.Kind):
    """A kind of somebody else's: twice what nn.Linear gives."""

    name = "Doubled"
    gives: ClassVar[bool] = False

    def module_class(self) -> type[nn.Module]:
        return Doubled

    def canonical_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[0], shape[1])

    def to_canonical(self, weight: Tensor) -> Tensor:
        return weight

    def from_canonical(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix

    def project_in(self, module: nn.Module, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        return 2 * x.to(a.dtype) @ a.t()

    def project_out(self, module: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        return h @ b.t()


class DoubledWithExamples(DoubledKind):
    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        return [(Doubled(6, 9, bias=False), torch.randn(2, 6))]


class DoubledNotInstalled(DoubledKind):
    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        raise ImportError("No module named 'doubled'")


class Kinds:
    name = "kinds"

    def __init__(self, kind: tg.Kind) -> None:
        self._kind = kind

    @tg.hookimpl
    def layer_kind(self) -> tg.Kind:
        return self._kind


class OnDoubled(Pair):
    @tg.hookimpl
    def adapter_method(self) -> tg.Method:
        return tg.Method(self.name, super().adapter_method().config, "", "", kinds=frozenset({"Linear", "Doubled"}), additive=True)


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        (DoubledKind(), "no check ran on Doubled layers: it gives no example layers"),
        (DoubledNotInstalled(), "no check ran on Doubled layers: its class is not installed (No module named 'doubled')"),
        (DoubledWithExamples(), ""),
    ],
    ids=["no examples", "not installed", "examples"],
)
def test_kinds_of_plugins_are_tried_if_they_give_examples(kind: tg.Kind, note: str) -> None:
    with registered(Kinds(kind)), registered(OnDoubled()) as name:
        report = tg.testing.check_plugin(name, only=["init", "merge", "files"])
    assert report.notes == ((note,) if note else ())
    assert [result.reason for result in report.checks] == (
        ["12 cases", "6 cases", "2 cases"] if note else ["15 cases", "9 cases", "4 cases"]
    )
    assert str(report).endswith(note)


def test_an_example_of_another_kind_is_not_taken() -> None:
    class Inherits(Linear):
        name = "Doubled"

        def module_class(self) -> type[nn.Module]:
            return Doubled

    with registered(Kinds(Inherits())), registered(OnDoubled()) as name:
        report = tg.testing.run_checks(name, only=["init"])
    assert report.notes == ("no check ran on Doubled layers: it gives no example layers",)


def test_nothing_is_left_behind(linears: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), [info.name for info in tg.registry().plugins()], list(warnings.filters)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert tg.testing.run_checks(linears).ok
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            assert tg.testing.run_checks(linears, only=["trains", "save_load"]).ok
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_rng_state().equal(before[0])
    assert [info.name for info in tg.registry().plugins()] == before[1]
    assert list(warnings.filters) == before[2]


def test_docs_say_of_every_check_what_it_proves() -> None:
    rows = [f"| `{name}` | {' '.join(str(check.function.__doc__).split())} |" for name, check in tg.testing.CHECKS.items()]
    text = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows


def test_two_runs_say_the_same(linears: str) -> None:
    assert tg.testing.run_checks(linears) == tg.testing.run_checks(linears)
