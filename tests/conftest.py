"""Fixtures that tests of several folders use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)  # a new example is found at a desk, not when landing
settings.load_profile("ci" if os.environ.get("CI") else "here")

# Failures in helper modules show the compared values too.
pytest.register_assert_rewrite("architectures", "one_layer", "peft_reference", "references", "renamed_adapters")

from command import Result  # noqa: E402  (transformers reads the environment when it is imported)
from installed import Installed  # noqa: E402
from tiny_methods import OnLinears, Spoiled, registered  # noqa: E402
from torchgraft_cli.main import main  # noqa: E402


@pytest.fixture
def adapt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command in this process, in a plain terminal of 200 columns."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("TORCHGRAFT_PLUGINS", "TORCHGRAFT_STRICT"):
        monkeypatch.delenv(name, raising=False)
    before = set(sys.modules)
    yield Installed(tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith("registry_test_"):
            del sys.modules[name]


@pytest.fixture
def linears() -> Iterator[str]:
    with registered(OnLinears()) as name:
        yield name


@pytest.fixture
def spoiled() -> Iterator[str]:
    with registered(Spoiled()) as name:
        yield name
