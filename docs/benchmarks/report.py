"""Write the page of the method comparison from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import figures
from claims import table_of_claims
from finetune import RUNS
from summary import MARK, WINDOW, Run, Runs, fixed_loss, mebibytes, percent, spread, steps_of, steps_to, trained

Sweep = Mapping[str, Mapping[float, float]]
HEAD = (
    "| method | base learning rate | trained parameters | mean final rank | accuracy | steps to the target loss "
    "| CPU time of a step, ms | peak memory | merged |"
)
RULE = "|---|--:|--:|--:|--:|--:|--:|--:|--:|"


def write(results: Sequence[Run], sweep: Sweep, directory: Path) -> None:
    found = {row: sorted((result for result in results if result["row"] == row), key=lambda result: result["seed"]) for row in RUNS}
    runs: Runs = {row: own for row, own in found.items() if own}
    if "lora" not in runs:
        raise SystemExit("the fixed loss is LoRA's: run the row lora first")
    figures.curves(runs, directory / "methods.svg")
    ranked = {row: own for row, own in runs.items() if row.startswith("adalora")}
    if ranked:
        figures.ranks(ranked, directory / "ranks.svg")
    (directory / "methods.md").write_text(page(runs, sweep, pictured=bool(ranked)))


def page(runs: Runs, sweep: Sweep, *, pictured: bool) -> str:
    fixed, first = fixed_loss(runs["lora"]), runs["lora"][0]
    how: dict[str, Any] = first["settings"]
    return PAGE.format(
        machine=" and ".join(sorted({run["machine"] for own in runs.values() for run in own})),
        seeds=seeds_of(runs),
        table="\n".join([HEAD, RULE, *(table_line(row, own, fixed) for row, own in runs.items())]),
        claims=table_of_claims(runs, fixed),
        rates=rates(sweep, {row: own[0]["settings"]["lr"] for row, own in runs.items()}),
        ranks=RANKS if pictured else "",
        texts=f"{how['train']:,}",
        test=f"{how['test']:,}",
        steps=how["steps"],
        batch=how["batch"],
        rank=how["options"]["rank"],
        head=f"{first['head']:,}",
        window=WINDOW,
        fixed=f"{fixed:.3f}",
        share=f"{MARK:.0%}",
    )


def seeds_of(runs: Runs) -> str:
    """Format the number of seeds: "3 seeds", or the range if a run was stopped."""
    counts = sorted({len(own) for own in runs.values()})
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds: not all runs are there yet"


def table_line(row: str, own: list[Run], fixed: float) -> str:
    low, middle, high = (1000 * mean(run["step_seconds"]["cpu"][place] for run in own) for place in range(3))
    cells = [
        row,
        f"{own[0]['settings']['lr']:g}" if own[0]["settings"]["lr"] else "",
        trained(own),
        f"{mean(rank for run in own for rank in run['ranks'].values()):.1f}" if own[0]["ranks"] else "",
        percent([run["accuracy"] for run in own]),
        steps_of([steps_to(run, fixed) for run in own]),
        f"{middle:.0f} ({low:.0f} to {high:.0f})",
        f"{mebibytes(own, 'peak')} (+{mebibytes(own, 'peak_growth')}) MiB",
        merged(own),
    ]
    return f"| {' | '.join(cells)} |"


def merged(own: list[Run]) -> str:
    """Format the accuracy after merging and the largest difference of an output."""
    if "merged_accuracy" not in own[0]:
        return ""
    return f"{spread([100 * run['merged_accuracy'] for run in own], '.1f')} %, {max(run['merged_difference'] for run in own):.0e}"


def rates(sweep: Sweep, used: Mapping[str, float]) -> str:
    """List the learning rates tried for each family, and whether the one in use is the best."""
    if not sweep:
        return "Learning rates were not compared in this run."
    lines = []
    for row, tried in sweep.items():
        best, rate = min(tried, key=lambda lr: tried[lr]), used.get(row)
        shown = ", ".join(f"{lr:g}: {tried[lr]:.3f}" for lr in sorted(tried))
        remark = "the best is in use" if rate == best else f"{rate:g} is in use" if rate is not None else "not run"
        edge = "; the best is at the edge of the range" if best in (min(tried), max(tried)) else ""
        lines.append(f"- {row}: {shown} ({remark}{edge})")
    return "Base learning rates, each with the validation loss after a shorter run with another seed:\n\n" + "\n".join(lines)


PAGE = """\
<!-- written by make bench-methods from methods.json -->
# The methods on a sentence encoder: accuracy, memory, speed

torchgraft's methods compared with each other, with full fine-tuning and with a head on the frozen encoder. A sentence encoder
(all-MiniLM-L6-v2, 22.7 M parameters) learns to classify the sentiment of tweets and reviews: {texts} texts for training, {test} held
out, {steps} steps of batch size {batch}, {seeds}. Each run also trains a new head of {head} parameters. Adapters have rank {rank} on all
linear layers that the sentence vector uses; AdaLoRA chooses its own ranks. Each run uses one thread.

Machine and versions: {machine}.

{table}

- ± is the standard deviation over the seeds.
- *Steps to the target loss*: until the mean training loss of {window} steps is at most {fixed}, LoRA's after {share} of the run.
- *CPU time of a step*: the median of the training steps, with quartiles in brackets.
- *Peak memory*: of the whole process; in brackets the increase during training, after model and libraries were loaded.
- *Merged*: accuracy with the adapter merged, and the largest difference of an output relative to the largest output.

{rates}

![loss curves and accuracies](methods.svg)

## Claims about the methods

A claim is *confirmed* if the means differ in its direction by more than the sum of both standard deviations, *contradicted* if they differ
by as much in the other direction, and otherwise *inconclusive*. A run that never reached the target loss counts as one step longer than
the run. A claim about savings also requires an accuracy that is not lower beyond that spread. With this few seeds a small difference can
remain undetected.

{claims}
{ranks}"""

RANKS = """
## AdaLoRA's ranks

Final rank of each layer, mean over the seeds.

![final ranks of each layer](ranks.svg)
"""
