"""A folder of models and adapters to spoil, the operations to try on it, and what none of them may do."""

from __future__ import annotations

import hashlib
import io
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torchgraft as tg
from spoiled_files import FC1, Q
from torchgraft.checkpoint.reading import open_checkpoint
from torchgraft.layers.of_checkpoint import layers_of_checkpoint
from torchgraft.on_files.check import check
from torchgraft_cli.main import main

SECONDS = 20
"""For one operation, which takes milliseconds: more is a hang, also on a busy machine."""


MEMORY = 1 << 20, 120
"""Bytes that reading a header may take: so many, and so many times the size of the file."""


SHARDS = {
    "model-1.safetensors": {"model.embed_tokens.weight": (6, 4), f"{Q}.weight": (4, 4), f"{Q}.bias": (4,)},
    "model-2.safetensors": {f"{FC1}.weight": (6, 4), "model.norm.weight": (4,), "lm_head.weight": (6, 4)},
}


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "hidden_size": 4}


PEFT = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": ["q_proj"],
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}


@dataclass(frozen=True)
class Sandbox:
    """A base in two shards, two adapters, one of them merged, and beside them what nobody may touch."""

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def listing(self) -> dict[str, str]:
        """Every path and what is there."""
        return {path.relative_to(self.root).as_posix(): _content(path) for path in sorted(self.root.rglob("*"))}

    @contextmanager
    def with_file(self, name: str, content: bytes) -> Iterator[None]:
        """`content` in place of the file `name`, for a while."""
        path = self.root / name
        before = path.read_bytes() if path.is_file() else None
        path.write_bytes(content)
        try:
            yield
        finally:
            path.unlink() if before is None else path.write_bytes(before)


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"it takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fails(call: Callable[[], object]) -> str:
    """The message of a TorchgraftError, or nothing. Any other exception goes on and is a failure."""
    with time_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore", tg.TorchgraftWarning)
        try:
            call()
        except tg.TorchgraftError as error:
            return str(error) or "(an error that says nothing)"
    return ""


def run_cli(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with time_limit(), warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
        warnings.simplefilter("default", tg.TorchgraftWarning)
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def assert_plain(*command: object) -> int:
    """One line of error at most, and no bug."""
    code, out, err = run_cli(*command)
    assert code in (0, 2), err or out
    assert "Traceback" not in out + err
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) <= 1, err
    if errors:
        assert code == 2
        assert errors[0].startswith("error: ")
    assert "\x1b" not in out + err
    return code


Operation = Callable[[Sandbox], object]


def look(sandbox: Sandbox) -> object:
    return layers_of_checkpoint(open_checkpoint(sandbox / "base"))


def check_with(adapter: str) -> Operation:
    return lambda sandbox: check(sandbox / "base", sandbox / adapter)


def merge_with(adapter: str, base: str = "base") -> Operation:
    return lambda sandbox: tg.merge_checkpoint(sandbox / base, sandbox / adapter, sandbox / "out")


def unmerge(sandbox: Sandbox) -> object:
    return tg.unmerge_checkpoint(sandbox / "merged", sandbox / "out")


COMMANDS = {
    "inspect": ("inspect", "base"),
    "select": ("inspect", "base", "--target", "@linear", "--json"),
    "check peft": ("check", "base", "peft"),
    "check native": ("check", "base", "native", "--json"),
    "merge peft": ("merge", "base", "peft", "-o", "out"),
    "merge native": ("merge", "base", "native", "-o", "out", "--json"),
    "merge again": ("merge", "merged", "native", "-o", "out"),
    "unmerge": ("unmerge", "merged", "-o", "out"),
}


OPERATIONS: dict[str, Operation] = {
    "inspect": look,
    "select": lambda sandbox: tg.plan(sandbox / "base", "@linear"),
    "check peft": check_with("peft"),
    "check native": check_with("native"),
    "merge peft": merge_with("peft"),
    "merge native": merge_with("native"),
    "merge again": merge_with("native", "merged"),
    "unmerge": unmerge,
}


def assert_harmless(sandbox: Sandbox, names: list[str], by_command: bool) -> None:
    """Each operation, or its command, ends well or with a message, and leaves no more than its output."""
    folders = {"base", "peft", "native", "merged", "out"}
    before = sandbox.listing()
    for name in names:
        if by_command:
            words = [sandbox / word if word in folders else word for word in COMMANDS[name]]
            failed = assert_plain(*words) != 0
        else:
            failed = bool(fails(partial(OPERATIONS[name], sandbox)))
        after = sandbox.listing()
        if not failed:
            after = {path: content for path, content in after.items() if path.split("/")[0] != "out"}
            shutil.rmtree(sandbox / "out", ignore_errors=True)
        assert after == before, name
