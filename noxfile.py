"""The tests in environments of their own: `make test-pythons`, `make test-lowest`."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
QUICK = ("python", "-m", "pytest", "-n", "2", "-m", "not slow")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The quick tests, with the versions in constraints.txt."""
    session.install("--constraint", "constraints.txt", "torch")  # first and pinned, as in the Makefile
    session.install("--constraint", "constraints.txt", "--editable", ".[test]")
    session.run(*QUICK, env=ONE_THREAD)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The quick tests, with the lowest versions that pyproject.toml allows."""
    constraints = Path(session.create_tmp(), "lowest.txt")
    constraints.write_text(str(session.run("python", "tools/lowest.py", silent=True)), encoding="utf-8")
    session.install("--constraint", str(constraints), "torch")
    session.install("--constraint", str(constraints), "--editable", ".[hf]", "peft==0.21.2", "pytest", "pytest-xdist", "hypothesis")
    session.run(*QUICK, env=ONE_THREAD)
