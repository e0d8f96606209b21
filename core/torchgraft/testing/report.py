"""The results of the checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Result:
    """The result of one check."""

    name: str
    outcome: Outcome
    reason: str
    """What failed, or why the check was skipped, or on how many cases it passed."""
    left_out: str = ""
    """For a check that passed: the kinds of layers on which it was skipped, and why."""


@dataclass(frozen=True)
class Report:
    """The results of all checks of one plugin. `str(report)` shows the counts and every failed or skipped check with its reason."""

    plugin: str
    checks: tuple[Result, ...]
    core: frozenset[str]
    """Names of the core checks, of which at least one must pass."""
    notes: tuple[str, ...] = ()
    """The kinds of layers on which no check ran, and why."""

    @property
    def passed(self) -> int:
        return self._count("passed")

    @property
    def failed(self) -> int:
        return self._count("failed")

    @property
    def skipped(self) -> int:
        return self._count("skipped")

    @property
    def ok(self) -> bool:
        """Whether nothing failed, at least one check passed, and, if core checks were selected, one of these passed."""
        core = [result for result in self.checks if result.name in self.core]
        return not self.failed and self.passed > 0 and (not core or any(result.outcome == "passed" for result in core))

    @property
    def verdict(self) -> str:
        """The counts in one line, with a note if no core check passed."""
        counts = f"{self.plugin}: {self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return counts if self.ok or self.failed else f"{counts}: no core check ran, so the method is untested"

    def __str__(self) -> str:
        return "\n".join([self.verdict, *self._lines()])

    def _lines(self) -> Iterator[str]:
        for outcome in ("failed", "skipped"):
            yield from (f"{outcome}  {result.name}: {result.reason}" for result in self.checks if result.outcome == outcome)
        partly: dict[str, list[str]] = {}
        for result in self.checks:
            if result.left_out:
                partly.setdefault(result.left_out, []).append(result.name)
        yield from (f"in part  {', '.join(names)}: without {left_out}" for left_out, names in partly.items())
        yield from (f"note  {note}" for note in self.notes)

    def _count(self, outcome: Outcome) -> int:
        return sum(result.outcome == outcome for result in self.checks)
