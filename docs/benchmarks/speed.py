"""Compare the speed of torchgraft with PEFT and with the frozen model: training, batches, rank allocation, attaching, start-up.

Run it with `make bench`; `--report` only rewrites results.md from results.json. Each part runs in a process of its own. The
implementations that it compares take turns, so that a slow phase of the machine slows all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headers import write_sparse
from llama_files import SHARDS, shards, tensors
from merge import ADAPT, HERE, SIZES, machine, run, versions

SHAPES = [(768, 2, 256), (768, 2, 1024), (1536, 1, 256), (1536, 1, 1024)]
"""Triples of hidden size, layers and tokens."""
SETTINGS = [(32, "float32"), (4, "float32"), (4, "bfloat16")]
"""Pairs of the base's bits and the dtype of its matrix products and of the adapter."""
Part = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--directory", type=Path, default=HERE, help="where the results are written")
    parser.add_argument("--part", help="measure one part only, with these arguments as JSON, and print JSON")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS), help="parts to measure; others stay as they were")
    parser.add_argument("--report", action="store_true", help="run nothing; write results.md from results.json")
    arguments = parser.parse_args()
    if arguments.part:
        name, *values = json.loads(arguments.part)
        print(json.dumps(PARTS[name][1](*values)))
        return
    path = arguments.directory / "results.json"
    if arguments.report:
        write(json.loads(path.read_text()), arguments.directory)
        return
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() and len(arguments.only) < len(PARTS) else {}
    here = {"machine": this_machine(), "versions": versions() | {"bitsandbytes": version("bitsandbytes")}}
    if other := [key for key in here if results and results[key] != here[key]]:
        sys.exit(f"results.json differs in {' and '.join(other)}: measure all parts")
    results |= here
    for name in arguments.only:
        found = []
        for values in PARTS[name][0](arguments.repetitions):
            print(name, *values, file=sys.stderr)
            found.append(in_process(name, *values))
        results[name] = found
    path.write_text(json.dumps(results, indent=1) + "\n")
    write(results, arguments.directory)


def write(results: dict[str, Any], directory: Path) -> None:
    from speed_report import page

    (directory / "results.md").write_text(page(results))
    print(f"wrote {directory / 'results.md'}")


def this_machine() -> dict[str, Any]:
    import torch

    return machine(Path(tempfile.gettempdir())) | {"instructions": torch.backends.cpu.get_cpu_capability()}


def in_process(name: str, *values: Any) -> Part:
    command = [sys.executable, "-W", "ignore", __file__, "--part", json.dumps([name, *values])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    part: Part = json.loads(done.stdout.splitlines()[-1])
    return part


def shapes(repetitions: int) -> list[Sequence[Any]]:
    from bitsandbytes.functional import has_avx512bf16

    settings = [
        (bits, dtype) for bits, dtype in SETTINGS if dtype == "float32" or has_avx512bf16()
    ]  # without native products an emulation would be timed
    return [(*setting, *shape, repetitions) for setting in settings for shape in SHAPES]


def steps(bits: int, dtype: str, hidden: int, layers: int, tokens: int, repetitions: int) -> Part:
    import torch
    from speed_rows import measure

    times = measure(hidden, layers, tokens, bits, getattr(torch, dtype), repetitions)
    return {"bits": bits, "dtype": dtype, "hidden": hidden, "layers": layers, "tokens": tokens, **times}


def memory(hidden: int, layers: int, tokens: int, row: str) -> Part:
    import torch
    from speed_rows import peak_of

    return {"hidden": hidden, "tokens": tokens, "row": row, "peak": peak_of(row, hidden, layers, tokens, 32, torch.float32)}


def memory_rows(repetitions: int) -> list[Sequence[Any]]:
    from speed_rows import ROWS

    return [(*shape, row) for shape in SHAPES for row in ROWS]


def allocation(repetitions: int) -> Part:
    from allocation import measure

    return measure(2 * repetitions)  # each has one decision; with few, the budget would fall in large steps


def attaching(repetitions: int) -> Part:
    from speed_scale import attach

    return attach(repetitions)


def batches(repetitions: int) -> Part:
    from speed_batch import measure

    return measure(repetitions)


def starting(repetitions: int) -> Part:
    """Time commands on a sparse checkpoint of 1.1B parameters, of which only headers and samples are read."""
    with tempfile.TemporaryDirectory(prefix="speed-bench-") as scratch:
        model = Path(scratch)
        index: dict[str, str] = {}
        for number, group in enumerate(shards(dict(tensors(SIZES["1.1B"]))), 1):
            file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
            write_sparse(model / file, group)
            index |= dict.fromkeys(group, file)
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **SIZES["1.1B"]}
        (model / "config.json").write_text(json.dumps(config))
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "adapt --help": [ADAPT, "--help"],
            "adapt inspect": [ADAPT, "inspect", model],
            "python -c 'import torchgraft'": [sys.executable, "-c", "import torchgraft"],
        }
        return timed_commands(commands, repetitions)


def timed_commands(commands: dict[str, list[Any]], repetitions: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in commands}
    for repetition in range(repetitions + 1):
        for name, command in commands.items():
            wall = run(command)[0].wall
            if repetition:
                found[name].append(wall)
    return found


def tried(repetitions: int) -> Part:
    from speed_tried import measure

    return measure(repetitions)


def once(repetitions: int) -> list[Sequence[Any]]:
    return [(repetitions,)]


PARTS: dict[str, tuple[Callable[[int], list[Sequence[Any]]], Callable[..., Part]]] = {
    "steps": (shapes, steps),
    "memory": (memory_rows, memory),
    "batches": (once, batches),
    "allocation": (once, allocation),
    "attaching": (once, attaching),
    "starting": (once, starting),
    "tried": (once, tried),
}
"""Name → the function that returns the arguments of each process, and the function that it runs."""


if __name__ == "__main__":
    main()
