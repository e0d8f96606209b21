"""The README's Python runs as it stands, and its figures are what it prints."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_example_runs_and_prints_what_its_comment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    exec(compile(example[1], "README.md", "exec"), {})
    printed = capsys.readouterr().out.strip()
    assert printed
    assert f"# {printed}\n" in example[1]


def test_every_command_of_the_table_exists(adapt) -> None:
    commands = set(re.findall(r"^\| `adapt (\w+)", README, re.MULTILINE))
    assert commands == {"inspect", "plugins", "apply", "check", "merge", "unmerge", "export"}
    assert all(adapt(command, "--help").code == 0 for command in commands)


def test_the_comparison_is_what_the_stored_results_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs" / "benchmarks"))
    loaded = set(sys.modules)
    try:
        comparison = import_module("comparison")
        assert f"{comparison.BEGIN}{comparison.section()}{comparison.END}" in README
    finally:
        for name in sys.modules.keys() - loaded:
            del sys.modules[name]


def test_the_restored_weights_are_those_of_the_stored_results() -> None:
    docs = Path(__file__).parents[2] / "docs"
    found = json.loads((docs / "benchmarks" / "unmerge.json").read_text())
    assert found["torchgraft"] == found["entries"]
    assert f"{found['PEFT']:,} of {found['entries']:,} weights" in (docs / "why-not-peft.md").read_text()
