"""The commands of the merge benchmark, and their results as medians and ratios."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from statistics import median
from typing import Any

CP, START, PEFT = "cp -r", "python -c 'import torch'", "PEFT"
MERGE, NO_UNDO, VERIFIED = "adapt merge --no-verify", "adapt merge --no-verify --no-undo", "adapt merge"
UNMERGE = "adapt unmerge"
ROWS = (CP, START, MERGE, NO_UNDO, VERIFIED, UNMERGE, PEFT)
Size = dict[str, Any]
"""The results at one size. "runs" has one entry for each repetition: row → wall time, CPU time and peak memory of one process."""


def values(size: Size, row: str, key: str) -> list[float]:
    return [run[row][key] for run in size["runs"] if row in run]


def ratios(size: Size, one: str, other: str) -> list[float]:
    """Return the ratios of wall times within each repetition, because a slow phase of the machine then slows both."""
    return [run[one]["wall"] / run[other]["wall"] for run in size["runs"] if one in run and other in run]


def apart(size: Size, one: str, other: str) -> float:
    """Return how much longer `one` takes than `other`: the difference of the medians, in seconds."""
    return median(values(size, one, "wall")) - median(values(size, other, "wall"))


def middle(numbers: Sequence[float], form: str) -> str:
    """Format the median with minimum and maximum: "1.20 (1.10 to 1.40)"."""
    if not numbers:
        return "not run"
    spread = f" ({min(numbers):{form}} to {max(numbers):{form}})" if len(numbers) > 1 else ""
    return f"{median(numbers):{form}}{spread}"


def percent(share: float) -> str:
    """Format a share, rounded down so that 100 % means every entry."""
    return f"{floor(share * 1e7) / 1e5:.5f} %"
