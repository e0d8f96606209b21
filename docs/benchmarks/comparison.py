"""Write the README's table of torchgraft and PEFT from the stored results: merge.json, unmerge.json and results.json.

Run it with `python docs/benchmarks/comparison.py` after a benchmark; a test compares the README with it. It imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from merge_runs import PEFT, VERIFIED, values

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- comparison, written by docs/benchmarks/comparison.py -->\n", "<!-- end of comparison -->"
SIZE, IMPORT = "1.1B", "python -c 'import torchgraft'"


def main() -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}{section()}{END}{rest.partition(END)[2]}")


def section() -> str:
    """Return the table and the line below it."""
    merge, unmerge, speed = (json.loads((HERE / f"{name}.json").read_text()) for name in ("merge", "unmerge", "results"))
    size, start = merge["sizes"][SIZE], speed["starting"][0]
    dense = [part["step"] for part in speed["steps"] if part["bits"] == 32]
    rows = [
        ("", "torchgraft", "PEFT"),
        ("---", "--:", "--:"),
        (
            "[merge LoRA into a checkpoint of 1.1 B parameters](docs/benchmarks/merge.md): time",
            seconds(size, VERIFIED),
            seconds(size, PEFT),
        ),
        ("… peak memory", megabytes(size, VERIFIED), megabytes(size, PEFT)),
        (
            "[weights restored bit for bit by unmerge](docs/why-not-peft.md), bfloat16",
            share(unmerge["torchgraft"], unmerge["entries"]),
            share(unmerge["PEFT"], unmerge["entries"]),
        ),
        ("[DoRA training step](docs/benchmarks/results.md) / frozen model", over(dense, "DoRA"), over(dense, "PEFT's DoRA")),
        ("LoRA training step / frozen model", over(dense, "LoRA"), over(dense, "PEFT's LoRA")),
        ("[`import torchgraft`](docs/benchmarks/results.md#start-up)", f"{median(start[IMPORT]):.2f} s", ""),
        ("`adapt inspect` of a checkpoint of that size", f"{median(start['adapt inspect']):.2f} s", "no command"),
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return f"{table}\n\n{conditions(merge)}\n"


def conditions(results: Mapping[str, Any]) -> str:
    """Return the machine and the versions in one sentence."""
    machine, versions = results["machine"], results["versions"]
    cores = f"{machine['cores']} cores of {machine['cpu']}"
    used = f"torch {versions['torch']}, PEFT {versions['peft']}"
    merging = f"merging is verified and has an undo record, with the files on {machine['files']}"
    return f"Medians on {cores} with {used}; {merging}; steps in float32, ranges over four shapes."


def seconds(size: Mapping[str, Any], row: str) -> str:
    return f"{median(values(dict(size), row, 'wall')):.1f} s"


def megabytes(size: Mapping[str, Any], row: str) -> str:
    return f"{median(values(dict(size), row, 'peak')) / 1e6:,.0f} MB"


def share(equal: int, entries: int) -> str:
    """Format a share of all entries; only all of them are 100 %."""
    return "100 %" if equal == entries else f"{min(100 * equal / entries, 99.9):.1f} %"


def over(steps: Sequence[Mapping[str, Sequence[float]]], row: str) -> str:
    """Format the range, over all shapes, of the median time relative to the frozen model's."""
    found = [median(one / other for one, other in zip(step[row], step["frozen"], strict=True)) for step in steps]
    return f"{min(found):.2f} to {max(found):.2f}"


if __name__ == "__main__":
    main()
