"""The code blocks of a page, and what running them prints."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torchgraft as tg
from torchgraft_cli.main import main

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (not yet run|not run: .+?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    mark: str
    """What the HTML comment right above it says: "not yet run", or "not run: " and why."""
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        found.append(Block(match[1], match[2], mark[1] if mark else "", text.count("\n", 0, match.start()) + 1))
    return found


def run_page(page: Path) -> None:
    """Run the python and console blocks in their order, in one namespace and in the current directory.

    What a console block shows below a command, and a text block below a python block, must be what is printed.
    """
    with _module(f"page_{page.stem.replace('-', '_')}") as module, _registered():
        blocks = blocks_of(page)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            if block.mark:
                continue
            where = f"{page.name}:{block.line}"
            if block.language == "python":
                printed = _run_python(block, where, module)
                if following is not None and following.language == "text":
                    _compare(where, following.text, printed)
            elif block.language == "console":
                for command, shown in commands_of(block.text):
                    _compare(f"{where}: {command}", shown, _run_command(command))


def commands_of(text: str) -> list[tuple[str, str]]:
    """(command, what is shown below it)."""
    pieces = re.split(r"^\$ ", text.replace("\\\n", " "), flags=re.MULTILINE)
    assert not pieces[0].strip(), f"a console block begins with a command: {pieces[0]!r}"
    return [(command, shown) for command, _, shown in (piece.partition("\n") for piece in pieces[1:])]


def matches(shown: str, printed: str) -> bool:
    """Whether `printed` is what is `shown`: there "..." stands for any text in a line, and for any lines if it is alone in one."""
    pattern = ""
    for line in shown.strip("\n").split("\n"):
        words = ".*".join(map(re.escape, line.rstrip().split("...")))
        pattern += r"(?:.*\n)*?" if line.strip() == "..." else words + r" *\n"
    return re.fullmatch(pattern, printed.strip("\n") + "\n") is not None


def _compare(where: str, shown: str, printed: str) -> None:
    assert matches(shown, printed), f"{where}: the page shows\n{shown}\nand this is printed:\n{printed}"


def _run_python(block: Block, where: str, module: ModuleType) -> str:
    code = compile("\n" * block.line + block.text, where, "exec", dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, module.__dict__)
    return out.getvalue()


def _run_command(command: str) -> str:
    """`adapt` in this process, for it starts in seconds; anything else in a shell."""
    program, *arguments = _words(command)
    if program != "adapt":
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        warnings.simplefilter("default", tg.TorchgraftWarning)
        with contextlib.suppress(SystemExit):
            main(arguments)
    return out.getvalue()


def _words(command: str) -> list[str]:
    import shlex

    return shlex.split(command, comments=True)


@contextlib.contextmanager
def _module(name: str) -> Iterator[ModuleType]:
    """A module that can be looked up by its name, as classes and plugins are."""
    sys.modules[name] = module = ModuleType(name)
    try:
        yield module
    finally:
        del sys.modules[name]


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    """What a page registers is gone after it."""
    before = {info.name for info in tg.registry().plugins()}
    try:
        yield
    finally:
        for info in tg.registry().plugins():
            if info.name not in before:
                tg.registry().unregister(info.name)
