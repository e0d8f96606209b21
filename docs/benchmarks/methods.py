"""Compare all methods and full fine-tuning on a sentence encoder and real text.

Run it with `make bench-methods`. It runs two processes at a time, one thread each, and writes methods.md, methods.json and two
figures. Results of finished runs with the same settings are reused from methods.json, so an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import report
from finetune import FULL, RUNS, STEPS, TEST, run, settings
from rich.console import Console
from rich.progress import track

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
SWEEP_SEED, SWEEP_STEPS, FEW = 99, 50, 100
SWEEP = {
    FULL: (1e-4, 2e-4, 4e-4),
    "lora": (1e-3, 2e-3, 4e-3),
    "loraplus": (2.5e-4, 5e-4, 1e-3),
    "adalora, budget": (2e-3, 5e-3, 1e-2, 2e-2),
}
"""Base learning rates to try for each family, on a seed that the comparison does not use."""
QUICK_STEPS, QUICK_SEEDS = 12, 2
Result = dict[str, Any]
console = Console(highlight=False)


class Wanted(NamedTuple):
    row: str
    seed: int
    lr: float
    steps: int
    texts: int
    """Number of test texts."""

    def is_in(self, results: Sequence[Result]) -> bool:
        how = settings(self.row, self.lr, self.steps, self.texts)
        return any((result["row"], result["seed"], result["settings"]) == (self.row, self.seed, how) for result in results)


def main() -> None:
    arguments = parser().parse_args()
    if arguments.run:
        row, seed = arguments.run
        lr = RUNS[row][2] if arguments.lr is None else arguments.lr
        arguments.out.write_text(json.dumps(run(row, int(seed), lr, arguments.steps, arguments.texts)) + "\n")
        return
    directory = arguments.directory or (Path(tempfile.mkdtemp()) if arguments.quick else HERE)
    wanted = list(planned(arguments.rows or list(RUNS), quick=arguments.quick))
    results = measure(wanted, directory / "methods.json", fresh=arguments.fresh, go=not arguments.report)
    report.write([result for result in results if result["seed"] != SWEEP_SEED], sweep_of(results), directory)
    console.print(f"wrote {directory / 'methods.md'} and its pictures")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--fresh", action="store_true", help="run everything again")
    found.add_argument("--report", action="store_true", help="run nothing; write table and pictures from methods.json")
    found.add_argument("--quick", action="store_true", help="a few steps, two seeds, no sweep; written to a new folder")
    found.add_argument("--rows", nargs="+", choices=RUNS, help="only these", metavar="ROW")
    found.add_argument("--directory", type=Path, help="where the results are and are written")
    found.add_argument("--run", nargs=2, metavar=("ROW", "SEED"), help="one run in this process, to --out")
    found.add_argument("--out", type=Path)
    found.add_argument("--lr", type=float, help="with --run: another base rate")
    found.add_argument("--steps", type=int, default=STEPS, help="with --run")
    found.add_argument("--texts", type=int, default=TEST, help="with --run: test texts")
    return found


def planned(rows: Sequence[str], *, quick: bool) -> Iterator[Wanted]:
    """Yield the sweep, then all rows for one seed before the next, so that drift of the machine affects all rows alike."""
    if quick:
        yield from (Wanted(row, seed, RUNS[row][2], QUICK_STEPS, FEW) for seed in range(QUICK_SEEDS) for row in rows)
        return
    yield from (Wanted(row, SWEEP_SEED, lr, SWEEP_STEPS, FEW) for row, rates in SWEEP.items() if row in rows for lr in rates)
    yield from (Wanted(row, seed, RUNS[row][2], STEPS, TEST) for seed in SEEDS for row in rows)


def measure(wanted: Sequence[Wanted], path: Path, *, fresh: bool, go: bool) -> list[Result]:
    """Return the results of `wanted`, from the file or by running; each result is written to the file at once."""
    results = [] if fresh or not path.exists() else json.loads(path.read_text())
    results = [result for result in results if "settings" in result]
    missing = [each for each in wanted if not each.is_in(results)] if go else []
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(in_process, each) for each in missing]
        try:
            for done in track(as_completed(waiting), "training", total=len(waiting), console=console):
                results.append(done.result())
                path.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [result for result in results if any(each.is_in([result]) for each in wanted)]


def in_process(wanted: Wanted) -> Result:
    """Run once in a separate process, so that its memory can be measured."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        options = {"--lr": wanted.lr, "--steps": wanted.steps, "--texts": wanted.texts, "--out": out}
        flat = [str(part) for option in options.items() for part in option]
        command = [sys.executable, __file__, "--run", wanted.row, str(wanted.seed), *flat]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        result: Result = json.loads(out.read_text())
    return result


def sweep_of(results: Sequence[Result]) -> dict[str, dict[float, float]]:
    """Return row → base learning rate → validation loss."""
    found: dict[str, dict[float, float]] = {}
    for result in results:
        if result["seed"] == SWEEP_SEED:
            found.setdefault(result["row"], {})[result["settings"]["lr"]] = result["validation_loss"]
    return found


if __name__ == "__main__":
    main()
