"""`adapt` with third-party plugins: their commands, how they are shown, and how broken ones are reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from safetensors.torch import load_file, save_file

import torchgraft as tg
from command import Result
from installed import METHOD, Installed

pytestmark = pytest.mark.filterwarnings("default::torchgraft.TorchgraftWarning")  # the command shows them

COMMANDS = """
import click
import torchgraft as tg

@tg.hookimpl
def register_commands(commands):
    @commands.command()
    @click.argument("word")
    def echo(word):
        \"\"\"Say WORD.\"\"\"
        if word == "mistake":
            raise tg.ConfigError("not this word")
        if word == "bug":
            raise KeyError(word)
        click.echo(f"NAME: {word}")
"""
OBSERVER = """
import torchgraft as tg

@tg.hookimpl(wrapper=True)
def adapter_merge():
    return (yield)
"""


@pytest.fixture(autouse=True)
def _fresh_registry(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command finds what the test has installed, beside the bundled plugins."""
    tg.registry.cache_clear()
    yield
    tg.registry.cache_clear()


def test_a_plugin_adds_a_command(adapt: Callable, installed: Installed) -> None:
    installed.add("speak", COMMANDS)
    assert "echo" in adapt("--help").out
    assert "Say WORD." in adapt("--help").out
    assert adapt("echo", "hello").out == "speak: hello\n"
    assert "Say WORD." in adapt("echo", "--help").out


def test_what_a_command_raises_is_one_line(adapt: Callable, installed: Installed) -> None:
    module = installed.add("speak", COMMANDS, distribution="speak-tools", version="0.4")
    wrong = adapt("echo", "mistake")
    assert (wrong.code, wrong.err) == (2, "error: not this word\n")
    assert adapt("echo").code == 2
    bug = adapt("echo", "bug")
    assert bug.code == 1
    assert bug.err.startswith(f"error: a bug in the plugin speak ({module}, from speak-tools 0.4): KeyError: 'bug'")


BROKEN = {
    "raises": (COMMANDS.replace("@commands.command()", "raise ValueError('odd')"), "its register_commands failed: ValueError: odd"),
    "exits": (COMMANDS.replace("@commands.command()", "raise SystemExit(3)"), "its register_commands failed: SystemExit: 3"),
    "no command": (
        "import torchgraft as tg\n\n@tg.hookimpl\ndef register_commands(commands):\n    commands.add_command(print, 'go')\n",
        "its command 'go' is a builtin_function_or_method, not a click.Command",
    ),
    "a name of ours": (COMMANDS.replace("def echo", "def merge"), "its command 'merge' has the name of one of adapt itself"),
    "a name of another": (COMMANDS, "its command 'echo' has the name of one of a_first"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_command_takes_no_other_away(case: str, adapt: Callable, installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    source, reason = BROKEN[case]
    installed.add("a_first", COMMANDS, distribution="first-tools")
    installed.add("bad", source, distribution="bad-tools")
    shown = adapt("--help")
    assert shown.code == 0
    assert shown.err.count(reason) == 1
    assert "from bad-tools 1.2" in shown.err
    assert adapt("echo", "hello").out == "a_first: hello\n"
    assert "Merge" in adapt("merge", "--help").out
    monkeypatch.setenv("TORCHGRAFT_STRICT", "1")
    strict = adapt("--help")
    assert strict.code == 2
    assert reason in strict.err


def test_a_plugin_that_cannot_be_loaded_leaves_every_command_working(adapt: Callable, installed: Installed) -> None:
    module = installed.add("bad", "import no_such_module_at_all", distribution="bad-tools", version="0.3")
    shown = adapt("--help")
    assert shown.code == 0
    assert f"the plugin bad ({module}, from bad-tools 0.3) is left out" in shown.err
    assert adapt("plugins", "show", "lora").code == 0
    found = adapt("plugins", "list")
    assert found.code == 0
    assert "update or uninstall bad-tools" in found.out.replace("\n", " ")
    (entry,) = [entry for entry in json.loads(adapt("plugins", "list", "--json").out) if entry["name"] == "bad"]
    assert "no_such_module_at_all" in entry["error"]
    wrong = adapt("plugins", "show", "bad")
    assert wrong.code == 2
    assert f"bad ({module}, from bad-tools 0.3) cannot be used: ModuleNotFoundError" in wrong.err


def test_what_a_plugin_provides_is_shown(adapt: Callable, installed: Installed) -> None:
    installed.add("speak", COMMANDS, distribution="speak-tools")
    installed.add("watch", OBSERVER, distribution="watch-tools")
    installed.add("shift", METHOD, distribution="shift-tools")
    entries = {entry["name"]: entry for entry in json.loads(adapt("plugins", "list", "--json").out)}
    assert entries["speak"]["provides"] == ["register_commands"]
    assert entries["watch"]["provides"] == ["adapter_merge"]
    assert "adapter_method" in entries["shift"]["provides"]
    assert "an observer of adapter_merge" in adapt("plugins", "show", "watch").out
    assert "commands of adapt" in adapt("plugins", "show", "speak").out
    shown = json.loads(adapt("plugins", "show", "shift", "--json").out)
    assert shown["capabilities"]["merges_rows"] is False
    assert shown["distribution"] == "shift-tools"


def test_with_four_broken_plugins_every_command_works(
    adapt: Callable, installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_signature = METHOD.replace("params, x, base", "params, x, layer").replace("base(x)", "layer(x)")
    modules = {
        "imports": installed.add("imports", "raise RuntimeError('at import')", distribution="import-tools"),
        "signature": installed.add("signature", wrong_signature, distribution="signature-tools"),
        "lora": installed.add("lora", METHOD, distribution="taken-tools"),
        "future": installed.add("future", METHOD, distribution="future-tools", requires="torchgraft>=99"),
    }
    model, paths = tmp_path / "model", [tmp_path / name for name in ("adapter", "merged", "back")]
    model.mkdir()
    save_file({"q_proj.weight": torch.randn(6, 4)}, model / "model.safetensors", metadata={"format": "pt"})
    commands = [
        ("--help",),
        ("plugins", "list"),
        ("plugins", "show", "lora"),
        ("plugins", "check", "lora", "--only", "init"),
        ("inspect", model, "--target", "q_proj"),
        ("apply", model, "--plugin", "lora", "--target", "q_proj", "-o", paths[0]),
        ("check", model, paths[0]),
        ("merge", model, paths[0], "-o", paths[1], "--allow-unchanged"),
        ("unmerge", paths[1], "-o", paths[2]),
        ("export", paths[0], "--to", "lora", "-o", tmp_path / "plain"),
    ]
    results = [adapt(*command) for command in commands]
    assert [result.code for result in results] == [0] * len(commands)
    shown = " ".join(results[1].out.split())
    warned = "".join(result.err for result in results)
    for name in ("imports", "signature", "future"):
        assert f"the plugin {name} ({modules[name]}, from" in warned
    for distribution in ("import-tools", "signature-tools", "taken-tools", "future-tools"):
        assert distribution in shown
    for reason in ("RuntimeError: at import", "{'layer'}", "is taken by lora", "it requires torchgraft>=99, and this is"):
        assert reason in shown
    monkeypatch.setenv("TORCHGRAFT_STRICT", "1")
    tg.registry.cache_clear()
    strict = adapt("inspect", model, "--target", "q_proj", "--plugin", "lora")
    assert strict.code == 2
    assert "taken-tools" in strict.err


def test_what_a_plugin_prints_is_no_part_of_an_answer(adapt: Callable, installed: Installed) -> None:
    installed.add(
        "noisy", "print('at import')\n" + COMMANDS.replace("@commands.command()", "print('at registering')\n    @commands.command()")
    )
    listed = adapt("plugins", "list", "--json")
    assert "noisy" in {entry["name"] for entry in json.loads(listed.out)}
    assert "at import" in listed.err
    help_ = adapt("--help")
    assert "at registering" in help_.err
    assert "at registering" not in help_.out


def test_a_plugin_that_is_left_out_is_not_said_to_be_missing(
    adapt: Callable, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.add("shift", METHOD)
    monkeypatch.setenv("TORCHGRAFT_PLUGINS", "")
    result = adapt("plugins", "show", "shift")
    assert (result.code, "the plugin 'shift' is installed, and left out by TORCHGRAFT_PLUGINS" in result.err) == (2, True)


@pytest.fixture
def adapter(adapt: Callable, installed: Installed, tmp_path: Path) -> tuple[Path, Path]:
    """A model and an adapter that the plugin shift 1.2 made."""
    module = installed.add("shift", METHOD, distribution="shift-tools")
    model, made = tmp_path / "model", tmp_path / "adapter"
    model.mkdir()
    save_file({"q_proj.weight": torch.randn(6, 4)}, model / "model.safetensors", metadata={"format": "pt"})
    assert adapt("apply", model, "--plugin", "shift", "--target", "q_proj", "-o", made).code == 0
    tg.registry.cache_clear()
    rmtree(tmp_path / "shift_tools-1.2.dist-info")
    del sys.modules[module]
    return model, made


def test_an_adapter_of_a_plugin_that_is_gone_says_what_made_it(adapt: Callable, adapter: tuple[Path, Path], tmp_path: Path) -> None:
    for command in (("check", *adapter), ("merge", *adapter, "-o", tmp_path / "merged")):
        result = adapt(*command)
        assert result.code == 2
        assert f"{adapter[1]}: created with shift-tools 1.2: there is no plugin 'shift'" in result.out + result.err


def test_an_adapter_of_another_version_is_said_to_be_one(
    adapt: Callable, adapter: tuple[Path, Path], installed: Installed, tmp_path: Path
) -> None:
    installed.add("shift", METHOD, distribution="shift-tools", version="2.0")
    said = "created with shift-tools 1.2, but shift-tools 2.0 is installed"
    assert said in _text(adapt("check", *adapter))
    merged = adapt("merge", *adapter, "-o", tmp_path / "merged", "--allow-unchanged")
    assert (merged.code, said in merged.out + merged.err) == (0, True)
    back = adapt("unmerge", tmp_path / "merged", "-o", tmp_path / "back")
    assert (back.code, said in back.err) == (0, True)
    with pytest.warns(tg.TorchgraftWarning, match=said):
        tg.load(torch.nn.ModuleDict({"q_proj": _linear(adapter[0])}), adapter[1])


def _linear(model: Path) -> torch.nn.Linear:
    layer = torch.nn.Linear(4, 6, bias=False)
    layer.weight = torch.nn.Parameter(load_file(model / "model.safetensors")["q_proj.weight"])
    return layer


def _text(result: Result) -> str:
    return " ".join((result.out + result.err).split())
