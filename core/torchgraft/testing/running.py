"""Run the checks, from Python, pytest and the command line."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torchgraft.errors import ConfigError, ConformanceError, TorchgraftError, near
from torchgraft.method.config import parse_config
from torchgraft.plugin.registry import registry
from torchgraft.testing.cases import Subject, isolated
from torchgraft.testing.catalogue import CHECKS
from torchgraft.testing.checks import Check
from torchgraft.testing.compare import FailedError, SkippedError
from torchgraft.testing.report import Report, Result


def run_checks(
    name: str, *, only: Iterable[str] = (), expected_failures: Mapping[str, str] = {}, options: Mapping[str, Any] = {}
) -> Report:
    """Run the checks on the installed method `name`. A check that fails is reported, not raised.

    Args:
        only: names of checks; empty: all checks.
        expected_failures: name of a check → why it fails. It is counted as skipped; if it passes, that is a failure.
        options: the method's options; those not given have their defaults.

    Raises:
        PluginError: there is no such method, or it cannot be loaded.
        ConfigError: there is no such check or option, or an expected failure has no reason.
    """
    chosen, subject = _prepared(name, only, expected_failures, options)
    results = tuple(_expected(_run(check, subject), expected_failures) for check in chosen)
    notes = tuple(f"no check ran on {kind} layers: {reason}" for kind, reason in subject.missing.items())
    return Report(name, results, frozenset(key for key, check in CHECKS.items() if check.core), notes)


def check_plugin(
    name: str, *, only: Iterable[str] = (), expected_failures: Mapping[str, str] = {}, options: Mapping[str, Any] = {}
) -> Report:
    """Run the checks as `run_checks` does, in a test: `def test_it(): tg.testing.check_plugin("ia3")`.

    Raises:
        ConformanceError: a check failed, or no core check passed. It is an AssertionError with the whole report.
        PluginError, ConfigError: as for `run_checks`.
    """
    report = run_checks(name, only=only, expected_failures=expected_failures, options=options)
    if not report.ok:
        raise ConformanceError(str(report))
    return report


def conformance(name: str, *, only: Iterable[str] = (), expected_failures: Mapping[str, str] = {}, options: Mapping[str, Any] = {}) -> Any:
    """Return a pytest fixture that turns each check into one test:

        check = tg.testing.conformance("ia3")

        def test_conforms(check):
            check()

    Raises:
        ConfigError: as for `run_checks`. If the method cannot be loaded, the tests fail.
    """
    import pytest

    chosen = tuple(check.name for check in _chosen(only, expected_failures))

    @pytest.fixture(params=chosen, ids=chosen)
    def check(request: pytest.FixtureRequest) -> Callable[[], None]:
        def run() -> None:
            (one,), subject = _prepared(name, [request.param], expected_failures, options)
            result = _expected(_run(one, subject), expected_failures)
            if result.outcome == "skipped" and not (one.core and not subject.examples):
                pytest.skip(result.reason)
            if result.outcome == "skipped":
                pytest.fail(f"{name}: {result.name}: the method is untested: {result.reason}", pytrace=False)
            if result.outcome == "failed":
                pytest.fail(f"{name}: {result.name}: {result.reason}", pytrace=False)

        return run

    return check


def _prepared(
    name: str, only: Iterable[str], expected_failures: Mapping[str, str], options: Mapping[str, Any]
) -> tuple[list[Check], Subject]:
    """Return the checks to run and the method under test, after checking every argument."""
    chosen = _chosen(only, expected_failures)
    parse_config(name, registry().method(name).config, options)
    return chosen, Subject(name, dict(options))


def _chosen(only: Iterable[str], expected_failures: Mapping[str, str]) -> list[Check]:
    names = [only] if isinstance(only, str) else list(only)
    for name in (*names, *expected_failures):
        if name not in CHECKS:
            raise ConfigError(f"there is no check {name!r}{near(name, CHECKS)}; the checks are {', '.join(CHECKS)}")
    for name, reason in expected_failures.items():
        if not (isinstance(reason, str) and reason.strip()):
            raise ConfigError(f"expected_failures: {name}: say why it fails; a reason is not optional")
    return [check for name, check in CHECKS.items() if not names or name in names]


def _run(check: Check, subject: Subject) -> Result:
    """Run one check on every layer that it applies to, up to the first failure."""
    passed, skipped = 0, dict[str, dict[str, None]]()
    for case in check.cases(subject):
        try:
            with isolated():
                check.function(case)
        except SkippedError as reason:
            skipped.setdefault(str(reason), {})[case.kind.name] = None
        except Exception as error:  # noqa: BLE001  (a plugin's code may raise anything; the other checks continue)
            return Result(check.name, "failed", f"{case}: {_explained(error)}")
        else:
            passed += 1
    left_out = "; ".join(f"{', '.join(kinds)}: {reason}" if passed or len(skipped) > 1 else reason for reason, kinds in skipped.items())
    if passed:
        cases = f"{passed} case{'s' if passed > 1 else ''}"
        return Result(check.name, "passed", f"{cases}; without {left_out}" if left_out else cases, left_out)
    return Result(check.name, "skipped", left_out or _why_nothing(check, subject))


def _why_nothing(check: Check, subject: Subject) -> str:
    missing = "; ".join(f"{kind}: {reason}" for kind, reason in subject.missing.items())
    return missing if missing and not subject.examples else f"not claimed: {check.subjects}"


def _expected(result: Result, expected_failures: Mapping[str, str]) -> Result:
    reason = expected_failures.get(result.name)
    if reason is None or result.outcome == "skipped":
        return result
    if result.outcome == "failed":
        return Result(result.name, "skipped", f"expected failure: {reason}")
    return Result(result.name, "failed", f"it passes, and is expected to fail ({reason}): take it out of expected_failures")


def _explained(error: Exception) -> str:
    """Describe the error in one line; if it was raised in a hook, name the line of the hook."""
    text = " ".join(str(error).split())
    if isinstance(error, FailedError):
        return text
    if isinstance(error, TorchgraftError):
        return f"refused: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if frame.name.startswith("adapter_")), frames[-1])
    return f"{type(error).__name__}: {text[:400]} ({Path(last.filename).name}, line {last.lineno}, in {last.name})"
