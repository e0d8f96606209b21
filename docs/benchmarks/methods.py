"""All methods and full fine-tuning on a real encoder and real text: a table, two pictures, and the claims with their figures.

Run it with `make bench-methods`. It runs two processes at a time, one thread each; what has run already is kept in
methods.json, and `--fresh` runs everything again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import report
from finetune import RUNS
from rich.console import Console
from rich.progress import track

HERE = Path(__file__).parent
RESULTS = HERE / "methods.json"
SEEDS = (0, 1, 2)
console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--report", action="store_true", help="run nothing; write table and pictures from methods.json")
    arguments = parser.parse_args()
    results = [] if arguments.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())
    done = {(result["row"], result["seed"]) for result in results}
    wanted = [(row, seed) for seed in SEEDS for row in RUNS if (row, seed) not in done]  # by seed first: rows are interleaved
    if not arguments.report:
        with ThreadPoolExecutor(2) as pool:
            for result in track(pool.map(one, wanted), "training", total=len(wanted), console=console):
                results.append(result)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results, HERE)
    console.print(f"wrote {HERE / 'methods.md'} and its pictures")


def one(run: tuple[str, int]) -> dict[str, Any]:
    """One run in a process of its own, so that its memory is its own."""
    row, seed = run
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        command = [sys.executable, str(HERE / "finetune.py"), row, str(seed), str(out)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        result: dict[str, Any] = json.loads(out.read_text())
    return result


if __name__ == "__main__":
    main()
