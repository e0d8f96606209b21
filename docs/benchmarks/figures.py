"""Draw the figures of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from summary import WINDOW, Runs, deviation, smooth

mpl.use("Agg")
mpl.rcParams.update({"svg.hashsalt": "torchgraft", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def curves(runs: Runs, path: Path) -> None:
    """Draw training loss against steps, and accuracy with its spread."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    colors = dict(zip(runs, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for row, results in runs.items():
        curve = np.mean([smooth(run["losses"]) for run in results], axis=0)
        left.plot(range(1, len(curve) + 1), curve, label=row, color=colors[row], linewidth=1.6)
    left.set(xlabel="step", ylabel=f"training loss, mean of the last {WINDOW} steps", title="Learning")
    left.legend(frameon=False, fontsize=8, ncols=2)
    for place, (row, results) in enumerate(runs.items()):
        values = [100 * run["accuracy"] for run in results]
        right.errorbar(mean(values), place, xerr=deviation(values), fmt="o", color=colors[row], capsize=3)
        right.plot(values, [place] * len(values), "|", color=colors[row], alpha=0.6)
    right.set(yticks=range(len(runs)), yticklabels=list(runs), xlabel="held-out accuracy, %", title="Accuracy, mean ± std and each seed")
    right.invert_yaxis()
    save(figure, path)


def ranks(runs: Runs, path: Path) -> None:
    """Draw the mean final rank of each layer: blocks from left to right, projections from top to bottom."""
    figure, axes = plt.subplots(1, len(runs), figsize=(11, 3.4), layout="constrained", squeeze=False)
    highest = max(max(run["ranks"].values()) for results in runs.values() for run in results)
    for axis, (row, results) in zip(axes[0], runs.items(), strict=True):
        projections, blocks, grid = rank_grid(results)
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
        axis.set(title=f"{row}: mean final rank", xlabel="block", xticks=range(len(blocks)), xticklabels=blocks)
        axis.set(yticks=range(len(projections)), yticklabels=projections)
        for y, x in np.ndindex(grid.shape):
            if not np.isnan(grid[y, x]):
                dark = grid[y, x] < 0.6 * highest
                axis.text(x, y, f"{grid[y, x]:.1f}", ha="center", va="center", color="white" if dark else "black", fontsize=8)
    figure.colorbar(image, ax=axes[0].tolist(), label="rank")
    save(figure, path)


def rank_grid(results: list[dict[str, Any]]) -> tuple[list[str], list[str], Any]:
    """Return projections, blocks and the mean rank of each pair, for the layers that belong to a block."""
    cells: dict[tuple[str, str], list[int]] = {}
    for run in results:
        for name, rank in run["ranks"].items():
            segments = name.split(".")
            block = next((segment for segment in segments if segment.isdecimal()), None)
            if block is not None:
                cells.setdefault((".".join(segments[segments.index(block) + 1 :]), block), []).append(rank)
    projections = list(dict.fromkeys(projection for projection, _ in cells))
    blocks = sorted({block for _, block in cells}, key=int)
    grid = np.array([[mean(cells[p, b]) if (p, b) in cells else np.nan for b in blocks] for p in projections])
    return projections, blocks, grid


def costs(sizes: Mapping[str, Mapping[str, tuple[float, float]]], path: Path) -> None:
    """Draw seconds and megabytes (size → row → both) as bars: a group for each row, a bar for each size."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 2.6), layout="constrained", sharey=True)
    rows = list(dict.fromkeys(row for found in sizes.values() for row in found))
    height = 0.8 / len(sizes)
    for axis, unit, form, title in zip(axes, ("s", "MB"), (".1f", ".0f"), ("Wall time", "Peak memory"), strict=True):
        for number, (size, found) in enumerate(sizes.items()):
            places = [rows.index(row) + (number - (len(sizes) - 1) / 2) * height for row in found]
            bars = axis.barh(places, [cost[axis is axes[1]] for cost in found.values()], height, label=size)
            axis.bar_label(bars, fmt=f"%{form} {unit}", padding=3, fontsize=8)
        axis.set(title=title, xlabel=unit, yticks=range(len(rows)), yticklabels=rows)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
