"""The command as a process: what it imports, where it writes, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(sys.executable).parent / "adapt"


def process(*command: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=60, **more)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["merge", "--help"], ["inspect", "X"], ["inspect", "X", "--target", "q_proj", "--plugin", "lora"], ["plugins", "list"]],
)
def test_torch_is_not_imported_by(llama: Path, arguments: list[str]) -> None:
    code = """import sys
from torchgraft_cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"torch", "numpy", "transformers"} & set(sys.modules)), file=sys.stderr)
"""
    done = process(sys.executable, "-c", code, *(str(llama) if word == "X" else word for word in arguments))
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert len(done.stdout) > 100


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, torchgraft; before = 'torch' in sys.modules; torchgraft.apply; print(before, 'torch' in sys.modules)"
    assert process(sys.executable, "-c", code).stdout == "False True\n"


def test_loading_the_commands_for_their_help_loads_no_registry() -> None:
    code = """import sys
from torchgraft_cli.main import COMMANDS, adapt
print(len([adapt.get_command(None, name) for name in COMMANDS]), {"pydantic", "pluggy"} & set(sys.modules))
"""
    assert process(sys.executable, "-c", code).stdout == "7 set()\n"


@pytest.mark.parametrize("arguments", [["inspect", "X"], ["inspect", "X", "--json"], ["plugins", "show", "lora"], ["--help"]])
def test_reader_that_went_away_is_no_error(llama: Path, arguments: list[str]) -> None:
    """As in `adapt inspect X | head -1`; exit code 1 would say that adapt has a bug."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [str(SCRIPT), *(str(llama) if word == "X" else word for word in arguments)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (0, -signal.SIGPIPE)


def test_terminal_that_cannot_show_a_character_is_no_error(tiny: Path) -> None:
    for arguments in (["inspect", tiny], ["inspect", tiny, "--json"], ["plugins", "show", "lora"]):
        done = process(SCRIPT, *arguments, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_rank_beyond_the_layer_is_one_warning_and_no_error(tiny: Path, more: list[str]) -> None:
    """As a process, for what Python itself does with warnings is part of it."""
    done = process(SCRIPT, "inspect", tiny, "--target", "v_proj", "-r", 4, *more)
    assert done.returncode == 0
    assert re.fullmatch(r"warning: model.layers.0.self_attn.v_proj and 3 more: rank 4 is more than min\(out, in\) = 2: .*\n", done.stderr)
    assert not more or json.loads(done.stdout)["trainable_params"] == 4 * 4 * (2 + 4)


def test_errors_of_a_process(tiny: Path) -> None:
    for command, says in ((["inspect", "nowhere"], "nowhere: no such file"), (["inspect", tiny, "-r", "0"], "rank = 0"), (["x"], "'x'")):
        done = process(SCRIPT, *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(f"error: .*{says}.*\n", done.stderr)


@pytest.mark.parametrize("plain", [True, False])
def test_colors_only_where_they_are_wanted(tiny: Path, plain: bool) -> None:
    main, side = os.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([SCRIPT, "inspect", tiny], stdout=side, env=env | ({"NO_COLOR": "1"} if plain else {})) as running:
        os.close(side)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while data := os.read(main, 4096):
                shown += data
    os.close(main)
    assert running.returncode == 0
    assert b"embed_tokens" in shown
    assert bool(re.search(rb"\x1b\[[\d;]*3\d", shown)) is not plain
