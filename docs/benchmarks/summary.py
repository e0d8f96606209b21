"""Summarize the runs of one row over its seeds, as numbers and as text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

WINDOW = 25
"""Steps over which the training loss is averaged."""
MARK = 0.6
"""Share of the run at which LoRA's mean curve defines the target loss."""
Run = dict[str, Any]
Runs = dict[str, list[Run]]


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the running mean over at most WINDOW steps."""
    return [mean(losses[max(0, step - WINDOW) : step]) for step in range(1, len(losses) + 1)]


def fixed_loss(lora: Sequence[Run]) -> float:
    return mean(smooth(run["losses"])[round(MARK * len(run["losses"])) - 1] for run in lora)


def steps_to(run: Run, fixed: float) -> int | None:
    """Return the first step whose running mean over a whole window is at most `fixed`."""
    window = min(WINDOW, len(run["losses"]))
    return next((step for step, loss in enumerate(smooth(run["losses"]), 1) if step >= window and loss <= fixed), None)


def steps_of(steps: Sequence[int | None]) -> str:
    """Format mean and deviation, "97 ± 4", or how many runs reached the target loss."""
    reached = [step for step in steps if step is not None]
    if len(reached) == len(steps):
        return spread(reached, ".0f")
    return f"reached by {len(reached)} of {len(steps)} runs" if reached else "never reached"


def deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float], form: str) -> str:
    return f"{mean(values):{form}} ± {stdev(values):{form}}" if len(values) > 1 else f"{mean(values):{form}}"


def percent(values: Sequence[float]) -> str:
    return f"{spread([100 * value for value in values], '.1f')} %"


def trained(own: Sequence[Run]) -> str:
    """Format the number of trained parameters of the encoder, at start and end if they differ."""
    start, end = own[0]["trained_at_start"], [run["trained"] for run in own]
    return f"{start:,}" if set(end) == {start} else f"{start:,} → {mean(end):,.0f}"


def mebibytes(own: Sequence[Run], key: str) -> str:
    return f"{mean(run[key] for run in own) / 2**20:.0f}"


def compare(first: Sequence[float], second: Sequence[float]) -> int:
    """Return 1 if `first` is larger by more than the sum of both standard deviations, -1 if smaller by as much, else 0."""
    difference, noise = mean(first) - mean(second), deviation(first) + deviation(second)
    return 0 if abs(difference) <= noise else 1 if difference > 0 else -1
