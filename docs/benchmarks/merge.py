"""Compare `adapt merge` on checkpoint files with PEFT and with copying the files: time, memory, and accuracy.

Run it with `make bench`. It takes about 10 GB in memory or on a disk, and writes merge.md, merge.json and merge.svg.
This process imports no torch, because the kernel counts its memory as a lower bound for each process that it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from merge_runs import CP, MERGE, NO_UNDO, PEFT, START, UNMERGE, VERIFIED

HERE = Path(__file__).parent
ADAPT = Path(sys.executable).with_name("adapt")
WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
NARROW = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18, "num_attention_heads": 16}
SIZES = {name: {**shape, "num_key_value_heads": 4, "vocab_size": 32000} for name, shape in {"1.1B": WIDE, "0.27B": NARROW}.items()}
"""Name → keys of config.json. The first is the shape of TinyLlama."""
EVERY = {"1.1B": 5, "0.27B": 1}
"""Stride over the adapted tensors that are compared. 5 and the 7 layers of a block have no common divisor, so each layer type occurs."""
NEEDED = 16e9
"""Free memory in bytes from which on the files are stored in memory."""
Files = Path
"""Directory with model/, adapter/ and the output."""
Command = Sequence[str | Path]


class Usage(NamedTuple):
    wall: float
    cpu: float
    """User plus system time of all threads, in seconds."""
    peak: int
    """Peak memory in bytes."""


def main() -> None:
    arguments = parser().parse_args()
    results = json.loads((arguments.directory / "merge.json").read_text()) if arguments.report else measure(arguments)
    from merge_report import write  # imported late: its memory would count for each measured process

    write(results, arguments.directory)
    print(f"wrote {arguments.directory / 'merge.md'}, merge.json and merge.svg")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--repetitions", type=int, default=5)
    found.add_argument("--peft-repetitions", type=int, default=3, help="repetitions that include PEFT, which is slow")
    found.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="only these", metavar="SIZE")
    found.add_argument("--scratch", type=Path, help="directory for the checkpoints; default: in memory, if there is room")
    found.add_argument("--directory", type=Path, default=HERE, help="where the results are written")
    found.add_argument("--report", action="store_true", help="run nothing; write page and picture from merge.json")
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, which removes the files
    scratch = arguments.scratch or room()
    found = {"machine": machine(scratch), "versions": versions(), "sizes": {}}
    for name in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="merge-bench-") as directory:
            found["sizes"][name] = measure_size(name, Path(directory), arguments.repetitions, arguments.peft_repetitions)
    return found


def room() -> Path:
    """Return a directory in memory if there is room, so that the disk is not measured."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and min(shutil.disk_usage(memory).free, meminfo("MemAvailable")) >= NEEDED
    return memory if roomy else Path(tempfile.gettempdir())


def measure_size(name: str, files: Files, repetitions: int, of_peft: int) -> dict[str, Any]:
    print(f"{name}: generating", flush=True)
    run([sys.executable, HERE / "llama_files.py", json.dumps(SIZES[name]), files])
    shards = [path.stat().st_size for path in (files / "model").glob("*.safetensors")]
    warm_up(files)
    found: dict[str, Any] = {
        "config": SIZES[name],
        "parameters": sum(shards) // 2,  # the headers are less than a thousandth of a percent
        "bytes": sum(shards),
        "shards": len(shards),
        "adapter_bytes": (files / "adapter" / "adapter_model.safetensors").stat().st_size,
        "runs": [],
        "accuracy": {},
    }
    for number in range(repetitions):
        row_of = repetition(name, files, max(shards), peft=number < of_peft)
        used: dict[str, Any] = {}
        for row, usage, out in row_of:
            print(f"{name}, {number + 1} of {repetitions}: {row}: {usage.wall:.2f} s, {usage.peak / 1e6:.0f} MB", flush=True)
            used[row] = usage._asdict()
            if row == MERGE:
                found["undo_bytes"] = json.loads(out)["undo_bytes"]
            if number == 0 and row in (MERGE, PEFT):
                found["accuracy"][row] = accuracy(name, files)
        found["runs"].append(used)
    return found


def warm_up(files: Files) -> None:
    """Load torch and copy the files once, so that the first repetition does not pay for a cold page cache."""
    run([sys.executable, "-c", "import torch"])
    run(["cp", "-r", files / "model", files / "out"])
    shutil.rmtree(files / "out")


def repetition(name: str, files: Files, shard: int, *, peft: bool) -> Iterator[tuple[str, Usage, str]]:
    """Run each command once; yield its row, usage and output. Its result is in out/ until the next iteration."""
    model, adapter, out, undone = (files / part for part in ("model", "adapter", "out", "undone"))
    merge: Command = [ADAPT, "merge", model, adapter, "--output", out, "--json"]
    commands: dict[str, Command] = {
        START: [sys.executable, "-c", "import torch"],
        CP: ["cp", "-r", model, out],
        NO_UNDO: [*merge, "--no-verify", "--no-undo"],
        VERIFIED: merge,
        MERGE: [*merge, "--no-verify"],
        UNMERGE: [ADAPT, "unmerge", out, "--output", undone],
        PEFT: [sys.executable, HERE / "merge_peft.py", model, adapter, out, str(shard)],
    }
    for row, command in commands.items():
        if row == PEFT and not peft:
            continue
        yield row, *run(command)
        if row != MERGE:  # which is unmerged next
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(undone, ignore_errors=True)


def accuracy(name: str, files: Files) -> dict[str, Any]:
    """Compare the merged checkpoint in out/ with the reference."""
    usage, out = run([sys.executable, HERE / "merge_accuracy.py", files / "model", files / "adapter", files / "out", str(EVERY[name])])
    print(f"{name}: compared with float64 in {usage.wall:.0f} s", flush=True)
    found: dict[str, Any] = json.loads(out)
    return found


def run(command: Command) -> tuple[Usage, str]:
    """Run one process; return its usage and output, or raise SystemExit with the end of its stderr."""
    os.sync()  # earlier writes are not written back while this process is timed
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed with {process.returncode}:\n{errors.read()[-2000:]}")
        return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024), out.read()


def machine(scratch: Path) -> dict[str, Any]:
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "memory": meminfo("MemTotal"),
        "files": filesystem(scratch),
    }


def meminfo(field: str) -> int:
    """Peak memory in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def filesystem(path: Path) -> str:
    """Its type: that of the mount that `path` lies in, the last one if one hides another."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    own = [(len(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return sorted(own, key=lambda each: each[0])[-1][1]


def versions() -> dict[str, str]:
    packages = ("torchgraft", "torch", "safetensors", "transformers", "peft")
    copying = subprocess.run(["cp", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    return {"Python": platform.python_version()} | {name: version(name) for name in packages} | {"cp": copying.rpartition(" ")[2]}


if __name__ == "__main__":
    main()
