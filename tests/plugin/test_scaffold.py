"""`adapt plugins new`: what it writes is complete, and right as it stands."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import torchgraft as tg


@pytest.mark.parametrize("name", ["rotate", "lora_2x"])
def test_a_new_plugin_passes_the_kit_and_its_own_tests(name: str, adapt: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = adapt("plugins", "new", name)
    home = tmp_path / f"torchgraft-{name.replace('_', '-')}"
    assert written.code == 0
    assert f"wrote {home.name}: pyproject.toml" in written.out
    assert {path.relative_to(home).as_posix() for path in home.rglob("*.*")} == {
        "pyproject.toml",
        "README.md",
        f"torchgraft_{name}.py",
        f"tests/test_{name}.py",
    }
    assert not [path for path in home.rglob("*.*") if "$" in path.read_text().replace("$ ", "")]
    project = tomllib.loads((home / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["torchgraft"] == {name: f"torchgraft_{name}"}
    monkeypatch.syspath_prepend(home)
    monkeypatch.syspath_prepend(home / "tests")
    tg.registry().register(import_module(f"torchgraft_{name}"), name)
    try:
        assert tg.testing.check_plugin(name, only=["init", "no_op", "trains", "merge", "bias", "rows", "unmerge", "files"]).skipped == 0
        import_module(f"test_{name}").test_it_is_the_formula()
    finally:
        tg.registry().unregister(name)


def test_the_directory_and_json(adapt: Callable, tmp_path: Path) -> None:
    document = json.loads(adapt("plugins", "new", "turned", "-o", tmp_path / "elsewhere", "--json").out)
    assert document["output"] == str(tmp_path / "elsewhere")
    assert all((tmp_path / "elsewhere" / name).is_file() for name in document["files"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora", "the name 'lora' is taken by the plugin lora (torchgraft_plugins.lora, from torchgraft"),
        ("Rotate", "'Rotate' cannot be the name of a method"),
        ("ro-tate", "'ro-tate' cannot be the name of a method"),
        ("../up", "'../up' cannot be the name of a method"),
        ("ia3_", "'ia3_' cannot be the name of a method"),
        ("a__b", "'a__b' cannot be the name of a method"),
        ("plugins", "the name 'plugins' would give a module torchgraft_plugins, and there is one"),
        ("cli", "the name 'cli' would give a module torchgraft_cli, and there is one"),
        ("1st", "'1st' cannot be the name of a method"),
        ("", "'' cannot be the name of a method"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name: str, says: str, adapt: Callable, tmp_path: Path) -> None:
    refused = adapt("plugins", "new", name, "-o", tmp_path / "new")
    assert refused.code == 2
    assert says in refused.err
    assert not (tmp_path / "new").exists()


def test_what_exists_is_not_written_over(adapt: Callable, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    refused = adapt("plugins", "new", "turned", "-o", tmp_path / "new")
    assert refused.code == 2
    assert "exists already" in refused.err
    assert list((tmp_path / "new").iterdir()) == []
