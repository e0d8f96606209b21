"""The conformance kit for pytest and on the command line: the fixture, and what `adapt plugins check` prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import torchgraft as tg
from command import Result

Adapt = Callable[..., Result]
NOTHING = "no core check ran, so the method is untested"


def test_fixture_is_one_test_for_each_check(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import torchgraft as tg\n"
        "check = tg.testing.conformance('lora', only=['init', 'no_op', 'modes', 'steps'],"
        " expected_failures={'modes': 'a good reason', 'steps': 'another'})\n"
        "def test_conforms(check):\n    check()\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "-W", "error", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env=_environment())
    assert re.findall(r"::test_conforms\[(\w+)\] (PASSED|FAILED|SKIPPED)", done.stdout) == [
        ("init", "PASSED"),
        ("no_op", "PASSED"),
        ("modes", "FAILED"),
        ("steps", "SKIPPED"),
    ]
    assert "lora: modes: it passes, and is expected to fail (a good reason): take it out of expected_failures" in done.stdout
    assert "not claimed: adapter_step or adapter_penalty" in done.stdout
    assert done.returncode == 1


check = tg.testing.conformance("scaled", only=["init", "merge"])


@pytest.mark.usefixtures("linears")
def test_conforms(check: Callable[[], None]) -> None:
    check()


def test_command_prints_a_table_and_the_counts(adapt: Adapt, linears: str) -> None:
    result = adapt("plugins", "check", linears, "--only", "merge", "--only", "init", "--only", "steps")
    assert (result.code, result.err) == (0, "")
    assert [line.rstrip() for line in result.out.splitlines()] == [
        "check  outcome  on what, or why",
        "init   passed   12 cases",
        "steps  skipped  not claimed: adapter_step or adapter_penalty",
        "merge  passed   6 cases",
        "scaled: 2 passed, 0 failed, 1 skipped",
    ]


def test_command_exits_with_2_if_a_check_fails_or_none_ran(adapt: Adapt, spoiled: str) -> None:
    result = adapt("plugins", "check", spoiled, "--only", "merge")
    assert (result.code, result.err) == (2, "")
    assert "compare adapter_merge with adapter_forward" in " ".join(result.out.split())
    assert result.out.splitlines()[-1] == "scaled: 0 passed, 1 failed, 0 skipped"
    result = adapt("plugins", "check", spoiled, "--only", "steps")
    assert (result.code, result.out.splitlines()[-1]) == (
        2,
        "scaled: 0 passed, 0 failed, 1 skipped: no core check ran, so the method is untested",
    )


@pytest.mark.parametrize(("only", "code"), [(["init", "additive"], 0), (["init", "merge"], 2)])
def test_command_gives_one_json_document(adapt: Adapt, spoiled: str, only: list[str], code: int) -> None:
    result = adapt("plugins", "check", spoiled, *(word for name in only for word in ("--only", name)), "--json")
    report = tg.testing.run_checks(spoiled, only=only)
    assert (result.code, result.err) == (code, "")
    assert json.loads(result.out) == {
        "plugin": "scaled",
        "ok": not code,
        "passed": 1,
        "failed": report.failed,
        "skipped": report.skipped,
        "checks": [{"name": each.name, "outcome": each.outcome, "reason": each.reason} for each in report.checks],
        "notes": [],
    }


def test_command_takes_options_of_the_method(adapt: Adapt) -> None:
    result = adapt("plugins", "check", "adalora", "--only", "steps", "--set", "allocator=budget", "--set", "total_steps=60", "--json")
    assert (result.code, json.loads(result.out)["passed"]) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lorra"], "there is no plugin 'lorra'; near names: lora"),
        (["lora", "--only", "merging"], "there is no check 'merging'"),
        (["lora", "--set", "rnk=2"], "lora has no option 'rnk'"),
        (["lora", "--set", "rank"], "'rank' is not an option and its value"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(adapt: Adapt, arguments: list[str], says: str) -> None:
    result = adapt("plugins", "check", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {says}")
    assert result.err.count("\n") == 1


def test_command_says_why_a_plugin_cannot_be_loaded(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torchgraft]\nbroken = broken_plugin\n")
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('half written')\n")
    done = _run("plugins", "check", "broken", path=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the plugin broken (broken_plugin, from broken 1) cannot be used: RuntimeError: half written; ")
    assert done.stderr.count("\n") == 1


def test_command_works_without_pytest() -> None:
    done = _run("plugins", "check", "lora", "--only", "init", "--json", before="sys.modules['pytest'] = None")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] == 1


def test_importing_the_package_imports_neither_torch_nor_pytest() -> None:
    code = "import sys, torchgraft; print({'torch', 'pytest'} & set(sys.modules)); torchgraft.testing; print('pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "set()\nFalse\n", done.stderr


def _run(*arguments: str, before: str = "", path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a process, after a line of Python."""
    code = f"import sys\n{before}\nfrom torchgraft_cli.main import run\nrun()"
    environment = _environment(path)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120, env=environment
    )


def _environment(path: Path | None = None) -> dict[str, str]:
    """This process's own, with its import path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*([str(path)] if path else []), *filter(None, sys.path)]), "PYTHONWARNINGS": ""}
