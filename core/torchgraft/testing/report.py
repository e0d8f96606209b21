"""What came of the checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Result:
    """Of one check."""

    name: str
    outcome: Outcome
    reason: str
    """What failed, or why it was skipped; of one that passed, on what."""
    left_out: str = ""
    """Of one that passed: on which kinds of layers it was skipped, and why."""


@dataclass(frozen=True)
class Report:
    """Of all checks of one plugin. `str(report)` has the counts, and every check that failed or was skipped, with its reason."""

    plugin: str
    checks: tuple[Result, ...]
    core: frozenset[str]
    """Those of the checks without which nothing is proven."""
    notes: tuple[str, ...] = ()
    """The kinds of layers that nothing was tried on, and why."""

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
        """Nothing failed, and it is no empty success: something passed, and of the core checks that were asked for, too."""
        core = [result for result in self.checks if result.name in self.core]
        return not self.failed and self.passed > 0 and (not core or any(result.outcome == "passed" for result in core))

    @property
    def verdict(self) -> str:
        """The counts in a line, and what they mean where they do not say it."""
        counts = f"{self.plugin}: {self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return counts if self.ok or self.failed else f"{counts}: no core check ran, so nothing is proven"

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
