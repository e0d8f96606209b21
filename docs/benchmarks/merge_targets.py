"""What was measured of each command as medians and ratios, and the targets that they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor
from statistics import median
from typing import Any, NamedTuple

CP, START, PEFT = "cp -r", "python -c 'import torch'", "PEFT"
MERGE, NO_UNDO, VERIFIED = "adapt merge --no-verify", "adapt merge --no-verify --no-undo", "adapt merge"
UNMERGE = "adapt unmerge"
ROWS = (CP, START, MERGE, NO_UNDO, VERIFIED, UNMERGE, PEFT)
COPIES, FASTER, PEAK, SHARE, ULPS = 1.5, 6, 600e6, 0.9999, 1
Size = dict[str, Any]
"""What was measured at one size; "runs" is row → what one process took, for each repetition."""


class Target(NamedTuple):
    text: str
    answer: Callable[[Size], tuple[str, bool | None]]
    """The figure, and whether it meets the target; None if that was not measured."""


def values(size: Size, row: str, key: str) -> list[float]:
    return [run[row][key] for run in size["runs"] if row in run]


def ratios(size: Size, one: str, other: str) -> list[float]:
    """Of wall times, within each repetition: what slows the machine for a while slows both."""
    return [run[one]["wall"] / run[other]["wall"] for run in size["runs"] if one in run and other in run]


def apart(size: Size, one: str, other: str) -> float:
    """What `one` takes longer than `other`: the difference of the medians, in seconds."""
    return median(values(size, one, "wall")) - median(values(size, other, "wall"))


def middle(numbers: Sequence[float], form: str) -> str:
    """ "1.20 (1.10 to 1.40)": the median, and in brackets the least and the most."""
    if not numbers:
        return "not run"
    spread = f" ({min(numbers):{form}} to {max(numbers):{form}})" if len(numbers) > 1 else ""
    return f"{median(numbers):{form}}{spread}"


def percent(share: float) -> str:
    """Cut off, not rounded: only all is 100 %."""
    return f"{floor(share * 1e7) / 1e5:.5f} %"


def near_copying(size: Size) -> tuple[str, bool]:
    shares = [run[MERGE]["wall"] / (COPIES * run[CP]["wall"] + run[START]["wall"]) for run in size["runs"]]
    return f"{middle(shares, '.2f')} times that", median(shares) <= 1


def faster_than_peft(size: Size) -> tuple[str, bool | None]:
    times = ratios(size, PEFT, MERGE)
    return (f"{middle(times, '.1f')} times", median(times) >= FASTER) if times else ("PEFT was not run", None)


def little_memory(size: Size) -> tuple[str, bool]:
    peak = max(max(values(size, row, "peak")) for row in (MERGE, NO_UNDO, VERIFIED))
    return f"{peak / 1e6:.0f} MB", peak <= PEAK


def mostly_equal(size: Size) -> tuple[str, bool]:
    found = size["accuracy"][MERGE]
    share = found["equal"] / found["entries"]
    return f"{percent(share)}; {found['entries'] - found['equal']:,} entries differ", share >= SHARE


def close(size: Size) -> tuple[str, bool]:
    found = size["accuracy"][MERGE]
    return f"at most {found['largest_ulps']:,}; {found['beyond_one_ulp']:,} entries beyond 1", found["largest_ulps"] <= ULPS


TARGETS = [
    Target(f"Merging takes at most {COPIES} × `{CP}` and the time of `{START}`", near_copying),
    Target(f"Merging is at least {FASTER} times as fast as PEFT", faster_than_peft),
    Target(f"No merge has more than {PEAK / 1e6:.0f} MB in memory", little_memory),
    Target(f"At least {100 * SHARE:.2f} % of the merged entries are the float64 sum, rounded once", mostly_equal),
    Target(f"No entry is more than {ULPS} unit in the last place away", close),
]
"""Of merging with an undo record, without verification, unless it says otherwise."""
