"""Figures over the seeds of one row, as text and as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

WINDOW = 25
"""Steps over which the training loss is averaged."""
MARK = 0.6
"""The fixed loss is the one that LoRA's mean curve has at this share of the run."""
Run = dict[str, Any]
Runs = dict[str, list[Run]]


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean over the last steps, up to a window."""
    return [mean(losses[max(0, step - WINDOW) : step]) for step in range(1, len(losses) + 1)]


def fixed_loss(lora: Sequence[Run]) -> float:
    return mean(smooth(run["losses"])[round(MARK * len(run["losses"])) - 1] for run in lora)


def steps_to(run: Run, fixed: float) -> int | None:
    """The first step whose running mean of a whole window is at or below `fixed`."""
    window = min(WINDOW, len(run["losses"]))
    return next((step for step, loss in enumerate(smooth(run["losses"]), 1) if step >= window and loss <= fixed), None)


def steps_of(steps: Sequence[int | None]) -> str:
    """ "97 ± 4", or how many runs came that far."""
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
    """The encoder's numbers that were trained; at the start and at the end if they differ."""
    start, end = own[0]["trained_at_start"], [run["trained"] for run in own]
    return f"{start:,}" if set(end) == {start} else f"{start:,} → {mean(end):,.0f}"


def mebibytes(own: Sequence[Run], key: str) -> str:
    return f"{mean(run[key] for run in own) / 2**20:.0f}"


def compare(first: Sequence[float], second: Sequence[float]) -> int:
    """1 if `first` is larger by more than both standard deviations together, -1 if smaller by as much, else 0."""
    difference, noise = mean(first) - mean(second), deviation(first) + deviation(second)
    return 0 if abs(difference) <= noise else 1 if difference > 0 else -1
