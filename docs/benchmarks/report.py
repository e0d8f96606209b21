"""The page of the comparison, made from its results alone."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import figures
import torch
from finetune import BATCH, FULL, HEAD_ALONE, RUNS, STEPS, TEST, TRAIN

import torchgraft as tg

WINDOW = 20
"""Steps over which the training loss is averaged."""
MARK = 0.6
"""The fixed loss is the one that LoRA's mean curve has at this share of the run."""
Runs = dict[str, list[dict[str, Any]]]


def write(results: Sequence[dict[str, Any]], directory: Path) -> None:
    runs: Runs = {row: [result for result in results if result["row"] == row] for row in RUNS}
    fixed = fixed_loss(runs["lora"])
    figures.curves(runs, smooth, directory / "methods.svg")
    figures.ranks({row: runs[row] for row in RUNS if row.startswith("adalora")}, directory / "ranks.svg")
    (directory / "methods.md").write_text(PAGE.format(**facts(runs, fixed), table=table(runs, fixed), claims=claims(runs, fixed)))


def facts(runs: Runs, fixed: float) -> dict[str, Any]:
    return {
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, torchgraft {tg.__version__}",
        "steps": STEPS,
        "batch": BATCH,
        "train": f"{TRAIN:,}",
        "test": f"{TEST:,}",
        "seeds": len(runs["lora"]),
        "window": WINDOW,
        "fixed": f"{fixed:.3f}",
        "share": f"{MARK:.0%}",
    }


def table(runs: Runs, fixed: float) -> str:
    head = "| method | base rate | trained numbers | accuracy | steps to the loss | step | peak memory | merged |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row, results in runs.items():
        steps = [steps_to(run, fixed) for run in results]
        reached = [found for found in steps if found is not None]
        first, third = (median(run["step_quartiles"][place] for run in results) for place in (0, 1))
        merged = f"{max(run['merged_difference'] for run in results):.0e}" if "merged_difference" in results[0] else ""
        lines.append(
            f"| {row} | {results[0]['lr']:g} | {trained(results)} | {percent([run['accuracy'] for run in results])} "
            f"| {spread(reached, '.0f') if len(reached) == len(steps) else f'{len(reached)} of {len(steps)} runs'} "
            f"| {1000 * median(run['step_seconds'] for run in results):.0f} ms ({1000 * first:.0f}-{1000 * third:.0f}) "
            f"| {mean(run['peak_growth'] for run in results) / 2**20:.0f} MiB | {merged} |"
        )
    return "\n".join(lines)


def claims(runs: Runs, fixed: float) -> str:
    """Each claim of the notes' §6 with the figures that answer it."""
    lora, plus, fast = runs["lora, same base rate"], runs["loraplus"], runs["loraplus, A fast"]
    quantised, whole = runs["qlora"], runs["lora"]
    bytes_of = {name: results[0]["model_bytes"] / 2**20 for name, results in (("lora", whole), ("qlora", quantised))}
    rows = [
        ("LoRA+ learns faster than LoRA at the same base rate", faster(plus, lora, fixed)),
        ("… and faster than LoRA at LoRA's own best rate", faster(plus, runs["lora"], fixed)),
        ("A with the larger rate, as the notes have it, learns faster than B with it", faster(fast, plus, fixed)),
        ("AdaLoRA by energy needs fewer numbers than LoRA, and loses no accuracy", smaller(runs["adalora, energy"], whole)),
        ("AdaLoRA by budget is more accurate than LoRA at the same mean rank", better(runs["adalora, budget"], whole)),
        (
            "QLoRA takes less memory for the model, and loses no accuracy",
            f"{bytes_of['qlora']:.1f} MiB of frozen weights against {bytes_of['lora']:.1f} MiB; accuracy: {better(quantised, whole)}",
        ),
        ("DoRA is more accurate than LoRA", better(runs["dora"], whole)),
        ("LoRA comes near full fine-tuning with few numbers", f"{trained(whole)} numbers; accuracy: {better(whole, runs[FULL])}"),
        ("LoRA is more accurate than the head alone", better(whole, runs[HEAD_ALONE])),
    ]
    return "\n".join(["| claim | what was measured |", "|---|---|", *(f"| {claim} | {answer} |" for claim, answer in rows)])


def faster(one: list[dict[str, Any]], other: list[dict[str, Any]], fixed: float) -> str:
    first, second = ([steps_to(run, fixed) or STEPS + 1 for run in runs] for runs in (one, other))
    shown = f"{spread(first, '.0f')} steps to the loss against {spread(second, '.0f')}"
    return f"{shown}: {verdict([-steps for steps in first], [-steps for steps in second])}"


def better(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    first, second = ([run["accuracy"] for run in runs] for runs in (one, other))
    return f"{percent(first)} against {percent(second)}: {verdict(first, second)}"


def smaller(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    return f"{trained(one)} numbers at the end against {trained(other)}; accuracy: {better(one, other)}"


def verdict(first: Sequence[float], second: Sequence[float]) -> str:
    """More, less, or no difference that three seeds could show: less than the two standard deviations added."""
    difference, noise = mean(first) - mean(second), stdev(first) + stdev(second)
    if abs(difference) <= noise:
        return "no difference beyond the spread"
    return "**yes**" if difference > 0 else "**no, the other way round**"


def fixed_loss(results: list[dict[str, Any]]) -> float:
    place = int(MARK * STEPS)
    return mean(smooth(run["losses"])[place] for run in results)


def steps_to(run: dict[str, Any], fixed: float) -> int | None:
    """The first step whose running mean of the loss is at or below `fixed`."""
    curve = smooth(run["losses"])
    return next((step for step, loss in enumerate(curve, 1) if step >= WINDOW and loss <= fixed), None)


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean over the last steps, up to a window."""
    return [mean(losses[max(0, step - WINDOW) : step]) for step in range(1, len(losses) + 1)]


def trained(results: list[dict[str, Any]]) -> str:
    start, end = results[0]["trained_at_start"], [run["trained"] for run in results]
    return f"{start:,}" if set(end) == {start} else f"{start:,} → {mean(end):,.0f}"


def percent(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f} %"


def spread(values: Sequence[float], form: str) -> str:
    return f"{mean(values):{form}} ± {stdev(values):{form}}"


PAGE = """# The methods on real data

A real sentence encoder (all-MiniLM-L6-v2, 22.7 M parameters) learns the sentiment of real tweets and reviews: {train}
texts for training, {test} held out, {steps} steps of {batch}, {seeds} seeds. Beside the encoder each run trains a new head.
LoRA and its kin have rank 8 on all linear layers; AdaLoRA's budget goes from 12 to a mean of 8. Measured on {machine}; one
thread for each run. Written by `make bench-methods`.

{table}

± is the standard deviation over the seeds. *Steps to the loss*: until the mean training loss of {window} steps is {fixed},
where LoRA is after {share} of the run. *Step*: the median, and the quartiles. *Peak memory*: what training added to the
process, most of it activations at this size. *Merged*: the largest difference of an output after merging, over the largest.
Base rates were chosen on a further seed, from half and twice their values.

![loss curves and accuracies](methods.svg)

## The claims of the methods

"Yes" and "no" need a difference larger than both standard deviations together.

{claims}

## AdaLoRA's ranks

![final ranks of each layer](ranks.svg)
"""
