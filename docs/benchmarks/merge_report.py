"""The page of the merge benchmark, made from its results alone."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import figures
from merge_targets import CP, MERGE, NO_UNDO, PEFT, ROWS, TARGETS, VERIFIED, Size, apart, middle, percent, ratios, values

Results = dict[str, Any]


def write(results: Results, directory: Path) -> None:
    (directory / "merge.json").write_text(json.dumps(results, indent=1) + "\n")
    figures.costs({name: costs(size) for name, size in results["sizes"].items()}, directory / "merge.svg")
    (directory / "merge.md").write_text(page(results))


def costs(size: Size) -> dict[str, tuple[float, float]]:
    """Row → seconds, megabytes: the medians."""
    rows = [row for row in (CP, MERGE, PEFT) if values(size, row, "wall")]
    return {row: (median(values(size, row, "wall")), median(values(size, row, "peak")) / 1e6) for row in rows}


def page(results: Results) -> str:
    sizes: dict[str, Size] = results["sizes"]
    machine = results["machine"]
    return PAGE.format(
        machine=f"{machine['cores']} cores of {machine['cpu']}, {machine['memory'] / 1e9:.0f} GB of memory, {machine['system']}",
        files=machine["files"],
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        targets=table(
            ["target", *sizes],
            [[target.text, *(verdict(*target.answer(size)) for size in sizes.values())] for target in TARGETS],
        ),
        sizes="".join(section(name, size) for name, size in sizes.items()),
        accuracy=table(
            [
                "checkpoint",
                "merged by",
                "tensors compared",
                "entries",
                "rounded once",
                "not",
                "by more than 1 unit",
                "most units",
                "most units of the larger",
                "other tensors",
            ],
            [accuracy_line(name, row, found) for name, size in sizes.items() for row, found in size["accuracy"].items()],
        ),
    )


def verdict(figure: str, met: bool | None) -> str:
    return figure if met is None else f"{figure}: {'met' if met else '**not met**'}"


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
        table=table(["command", "wall, s", "CPU, s", "peak memory, MB", "wall / cp", "PEFT / it"], lines),
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
# Merging on files

A LoRA adapter of rank 16 on all linear layers of the blocks is merged into a checkpoint of Llama's form with random weights in
bfloat16. Each command is a process of its own, from its start to its end, with as many threads as it takes by itself; all of them
take turns within a repetition. Figures are medians, with the least and the most in brackets; ratios are taken within a repetition.

Measured on {machine}, with the files on {files}:
{versions}.

## Targets

{targets}

Those of time are for merging with an undo record and without verification, which is counted apart.

![wall time and peak memory](merge.svg)

- *CPU*: user and system time. *PEFT / it*: how many times as long PEFT takes.
- *Peak memory*: the kernel's ru_maxrss, which counts mapped pages of files as well. No process has less than the few MB of the one
  that started it.
- *PEFT*: `from_pretrained` in bfloat16, `merge_and_unload`, `save_pretrained`.
{sizes}
## Accuracy

The reference is W + s·B·A in float64, rounded once to bfloat16: to the nearest, ties to even. *Rounded once* is the share of
entries that are equal to it bit for bit. A unit in the last place is the step to the next number: of the result, or of the larger of
the result and W. Where W and s·B·A nearly cancel, the result's units are far smaller than those of what was added.

{accuracy}
"""

SECTION = """
## {name}

{parameters} M parameters, {bytes} MB in {shards} files: {blocks} blocks, hidden size {hidden}, MLP {ffn}, {heads} heads,
{shared} of keys and values. The adapter has {adapter} MB. Repetitions: {repetitions}, of PEFT {peft}.

{table}

Verification takes {verification} s, the undo record {undo} s (differences of medians) and {undo_bytes} MB, {undo_share} of the checkpoint.
"""
