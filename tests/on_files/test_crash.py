"""Merges and unmerges that are killed, interrupted, or run out of disk: the output is absent or whole, and the source as it was.

Run as a script, this module starts the command in a fork of itself and sends it a signal after a while, again and again: a fork
has torch already, so that the signal falls into the work and not into imports.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import torchgraft as tg
from models import perturb_
from torchgraft.disk import new_directory
from torchgraft_cli.main import main

SHAPES = {"q_proj": (512, 512), "up_proj": (1536, 512), "down_proj": (512, 1536)}
LEFT, NOTHING = "left something", "left nothing"


def write_case(folder: Path, blocks: int) -> None:
    """A base in three shards with an adapter, its merge, and that unmerged."""
    base = folder / "base"
    base.mkdir(parents=True)
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(1000, 512)})
    for block in range(blocks):
        model[f"h{block}"] = torch.nn.ModuleDict({name: torch.nn.Linear(k, d, bias=False) for name, (d, k) in SHAPES.items()})
    model.to(torch.bfloat16)
    names = list(model.state_dict())
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensor for name, tensor in model.state_dict().items() if weight_map[name] == file}, base / file, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(f'{{"weight_map": {str(weight_map).replace(chr(39), chr(34))}}}')
    (base / "tokenizer.json").write_text("{}")
    adapter = tg.apply(model, "lora", ["@linear", "@embedding"])
    perturb_(adapter.parameters(), 0.02)
    adapter.save(folder / "adapter")
    tg.merge_checkpoint(base, folder / "adapter", folder / "merged")
    tg.unmerge_checkpoint(folder / "merged", folder / "unmerged")
    assert hashes(folder / "unmerged") == hashes(base)


def hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def strike(folder: Path, command: str, number: int, times: int, seed: int, burst: int = 1) -> Counter[str]:
    """Send the signal `number`, `burst` times, at `times` random moments of a merge or an unmerge; what came of it each time."""
    out = folder / "out"
    arguments = {
        "merge": ["merge", str(folder / "base"), str(folder / "adapter"), "-o", str(out)],
        "unmerge": ["unmerge", str(folder / "merged"), "-o", str(out)],
    }[command]
    sources = {name: hashes(folder / name) for name in ("base", "adapter", "merged")}
    right = hashes(folder / {"merge": "merged", "unmerge": "unmerged"}[command])
    length = min(duration(arguments, out) for _ in range(3))  # the first finds nothing in the caches, and most strikes would come late
    chance, came = random.Random(seed), Counter[str]()
    for attempt in range(4 * times):
        if attempt >= times and (number != signal.SIGKILL or any(LEFT in what for what in came)):
            break  # a kill that fell into the work is waited for
        code = run(arguments, number, chance.uniform(0, 1.1 * length), burst)
        left = [path for path in folder.iterdir() if path.name.startswith(".out.")]
        if out.exists():
            assert hashes(out) == right, "the output is there, and is not what it should be"
        assert number == signal.SIGKILL or not left, "what was begun was not cleaned up"
        assert {name: hashes(folder / name) for name in sources} == sources, "a source was changed"
        came[f"exit {code}, output {'whole' if out.exists() else 'absent'}, {LEFT if left else NOTHING}"] += 1
        for path in (*left, out):
            shutil.rmtree(path, ignore_errors=True)
    return came


def duration(arguments: list[str], out: Path) -> float:
    start = time.monotonic()
    assert run(arguments, None, 0.0) == 0
    length = time.monotonic() - start
    shutil.rmtree(out)
    return length


def run(arguments: list[str], number: int | None, delay: float, burst: int = 1) -> int:
    """The command in a fork that gets the signal `number` after `delay` seconds; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without it
        try:
            main(arguments)
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        os._exit(0)
    if number is not None:
        time.sleep(delay)
        for _ in range(burst):
            os.kill(child, number)
            time.sleep(0.001)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def strikes(folder: Path, command: str, number: int, times: int, burst: int = 1) -> dict[str, int]:
    """`strike` in a process of its own, whose torch has one thread: others would not be there after a fork."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder), command, str(int(number)), str(times), str(burst)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    lines = [line.rpartition(": ") for line in done.stdout.splitlines()]
    return {what: int(count) for what, _, count in lines}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crash") / "case"
    write_case(folder, 3)
    return folder


@pytest.mark.parametrize("command", ["merge", "unmerge"])
def test_a_kill_leaves_the_output_absent_or_whole(case: Path, command: str) -> None:
    came = strikes(case, command, signal.SIGKILL, 8)
    assert sum(came.values()) >= 8
    assert any("output absent, left something" in what for what in came), "none fell into the work"


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("command", ["merge", "unmerge"])
def test_sixty_kills_leave_the_output_absent_or_whole(tmp_path: Path, command: str) -> None:
    write_case(tmp_path / "case", 12)
    came = strikes(tmp_path / "case", command, signal.SIGKILL, 60)
    assert sum(came.values()) == 60
    assert sum(count for what, count in came.items() if "exit -9, output absent, left something" in what) >= 20, (
        "too few fell into the work"
    )


@pytest.mark.parametrize("command", ["merge", pytest.param("unmerge", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_cleans_up(case: Path, command: str, number: int, code: int) -> None:
    came = strikes(case, command, number, 6)
    assert {what.partition(",")[0] for what in came} <= {f"exit {code}", "exit 0", f"exit -{int(number)}"}
    assert any(what.startswith(f"exit {code}, output absent") for what in came)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_several_signals_in_a_row_clean_up_as_one_does(case: Path, number: int, code: int) -> None:
    came = strikes(case, "merge", number, 10, burst=3)
    assert {what.partition(",")[0] for what in came} <= {f"exit {code}", "exit 0", f"exit -{int(number)}"}
    assert any(what.startswith(f"exit {code}, output absent") for what in came)


def test_a_link_that_is_called_like_a_left_over_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.x.partial").symlink_to(tmp_path / "elsewhere")
    with new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "elsewhere").is_dir()


DISK = """
import shutil, sys
from torchgraft_cli.main import main
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # as where the room goes while it is used
main(sys.argv[1:])
"""


def on_small_disk(folder: Path, size: str, *arguments: str) -> tuple[int, str, list[str]]:
    """The command with a disk of `size` at folder/disk; what it said, and what is on the disk after it."""
    (folder / "disk").mkdir(exist_ok=True)
    script = (
        f"mount -t tmpfs -o size={size} none {folder}/disk && {{ {sys.executable} -c '{DISK}' {' '.join(arguments)}; code=$?; "
        f"echo LISTING; ls -A {folder}/disk; exit $code; }}"
    )
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user", "--user"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True, env=environment, check=False)
    said, found, listing = done.stdout.partition("LISTING\n")
    if not found:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    return done.returncode, said + done.stderr, listing.split()


@pytest.mark.parametrize(("command", "size"), [("merge", "1m"), ("merge", "12m"), ("merge", "13m"), ("unmerge", "5m")])
def test_a_disk_that_runs_full_is_reported_and_left_empty(case: Path, command: str, size: str) -> None:
    """Full among the weights, at their end, or at what stands beside them."""
    sources = ["base", "adapter"] if command == "merge" else ["merged"]
    code, said, listing = on_small_disk(case, size, command, *(str(case / name) for name in sources), "-o", str(case / "disk" / "out"))
    assert (code, listing) == (2, [])
    assert "error: " in said
    assert "No space left on device; nothing was left behind" in said


def test_a_disk_that_is_large_enough_is_written(case: Path) -> None:
    code, said, listing = on_small_disk(case, "20m", "merge", str(case / "base"), str(case / "adapter"), "-o", str(case / "disk" / "out"))
    assert (code, listing) == (0, ["out"]), said


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in ("on_files.unmerge", "on_files.merge_verify"):  # so that a fork need not import them
        import_module(f"torchgraft.{module}")
    for what, count in strike(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]), seed=0, burst=int(sys.argv[5])).items():
        print(f"{what}: {count}")
