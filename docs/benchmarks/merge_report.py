"""Write the page of the merge benchmark from its results."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import figures
from merge_runs import CP, MERGE, NO_UNDO, PEFT, ROWS, VERIFIED, Size, apart, middle, percent, ratios, values

Results = dict[str, Any]


def write(results: Results, directory: Path) -> None:
    (directory / "merge.json").write_text(json.dumps(results, indent=1) + "\n")
    figures.costs({name: costs(size) for name, size in results["sizes"].items()}, directory / "merge.svg")
    (directory / "merge.md").write_text(page(results))


def costs(size: Size) -> dict[str, tuple[float, float]]:
    """Return row → median seconds and median megabytes."""
    rows = [row for row in (CP, MERGE, PEFT) if values(size, row, "wall")]
    return {row: (median(values(size, row, "wall")), median(values(size, row, "peak")) / 1e6) for row in rows}


def page(results: Results) -> str:
    sizes: dict[str, Size] = results["sizes"]
    machine = results["machine"]
    return PAGE.format(
        machine=f"{machine['cores']} cores of {machine['cpu']}, {machine['memory'] / 1e9:.0f} GB of memory, {machine['system']}",
        files=machine["files"],
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        sizes="".join(section(name, size) for name, size in sizes.items()),
        accuracy=table(
            [
                "checkpoint",
                "merged by",
                "tensors compared",
                "entries",
                "correctly rounded",
                "not",
                "by more than 1 ulp",
                "largest error, ulp",
                "ulp of the larger operand",
                "other tensors",
            ],
            [accuracy_line(name, row, found) for name, size in sizes.items() for row, found in size["accuracy"].items()],
        ),
    )


def section(name: str, size: Size) -> str:
    lines = [
        [
            f"`{row}`" if row != PEFT else row,
            middle(values(size, row, "wall"), ".2f"),
            middle(values(size, row, "cpu"), ".2f"),
            middle([peak / 1e6 for peak in values(size, row, "peak")], ".0f"),
            middle(ratios(size, row, CP), ".2f"),
            middle(ratios(size, PEFT, row), ".1f"),
        ]
        for row in ROWS
    ]
    config = size["config"]
    return SECTION.format(
        name=name,
        parameters=f"{size['parameters'] / 1e6:,.0f}",
        bytes=f"{size['bytes'] / 1e6:,.0f}",
        hidden=config["hidden_size"],
        blocks=config["num_hidden_layers"],
        ffn=config["intermediate_size"],
        heads=config["num_attention_heads"],
        shared=config["num_key_value_heads"],
        shards=size["shards"],
        adapter=f"{size['adapter_bytes'] / 1e6:,.0f}",
        repetitions=len(size["runs"]),
        peft=len(values(size, PEFT, "wall")),
        table=table(["command", "wall time, s", "CPU time, s", "peak memory, MB", "time / cp", "PEFT / time"], lines),
        verification=f"{apart(size, VERIFIED, MERGE):.2f}",
        undo=f"{apart(size, MERGE, NO_UNDO):.2f}",
        undo_bytes=f"{size['undo_bytes'] / 1e6:,.0f}",
        undo_share=f"{100 * size['undo_bytes'] / size['bytes']:.1f} %",
    )


def accuracy_line(name: str, row: str, found: dict[str, Any]) -> list[str]:
    return [
        name,
        f"`{row}`" if row != PEFT else row,
        f"{found['compared']} of {found['adapted']}",
        f"{found['entries']:,}",
        percent(found["equal"] / found["entries"]),
        f"{found['entries'] - found['equal']:,}",
        f"{found['beyond_one_ulp']:,}",
        f"{found['largest_ulps']:,}",
        f"{found['largest_error']:.3f}",
        "unchanged" if found["others_unchanged"] else "**changed**",
    ]


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---", *["--:"] * (len(head) - 1)], *lines))


PAGE = """\
<!-- written by make bench from merge.json -->
# Merging a checkpoint: time, memory, accuracy

`adapt merge` and `adapt unmerge` compared with PEFT (`from_pretrained` in bfloat16, `merge_and_unload`, `save_pretrained`) and with
`cp -r`: a LoRA adapter of rank 16 on all linear layers of the blocks, and Llama-shaped checkpoints with random weights in bfloat16.

Machine: {machine}, files on {files}.
Versions: {versions}.

![wall time and peak memory](merge.svg)

- Each command is a process of its own, timed from start to exit, with its default number of threads. The commands take turns within a
  repetition. Figures are medians, with minimum and maximum in brackets; ratios are taken within a repetition.
- *CPU time* is user plus system time. *PEFT / time* is how many times as long PEFT takes.
- *Peak memory* is the kernel's `ru_maxrss`, which includes mapped pages of files.
{sizes}
## Accuracy

The reference is W + s·B·A in float64, rounded once to bfloat16 (to nearest, ties to even). *Correctly rounded* is the share of entries
that equal it bit for bit. An error is given in units in the last place (ulp) of the result, and in ulp of the larger of the result and
W: where W and s·B·A nearly cancel, an ulp of the result is far smaller.

{accuracy}
"""

SECTION = """
## {name} parameters

{parameters} M parameters, {bytes} MB in {shards} files: {blocks} blocks, hidden size {hidden}, MLP {ffn}, {heads} attention heads,
{shared} key-value heads. The adapter is {adapter} MB. {repetitions} repetitions, {peft} of them with PEFT.

{table}

Verification takes {verification} s and the undo record {undo} s (differences of medians). The undo record is {undo_bytes} MB,
{undo_share} of the checkpoint.
"""
