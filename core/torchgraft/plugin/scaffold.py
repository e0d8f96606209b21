"""Write a new plugin as a complete package (`adapt plugins new`)."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

from torchgraft.disk import new_directory, refuse_existing
from torchgraft.errors import PluginError
from torchgraft.plugin.registry import registry
from torchgraft.version import __version__

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def distribution_of(name: str) -> str:
    return f"torchgraft-{name.replace('_', '-')}"


def new_plugin(name: str, directory: str | Path) -> list[Path]:
    """Write the package of a method called `name` to the new `directory`, and return the files in it.

    The package contains a working low-rank method to start from, and tests that run the conformance kit.

    Raises:
        PluginError: the name is not valid or is taken.
        FileFormatError: the directory exists.
    """
    if not NAME.fullmatch(name):
        raise PluginError(
            f"{name!r} cannot be the name of a method: use lowercase letters and digits, a letter first, with single _ between"
        )
    taken = next((info for info in registry().plugins() if info.name == name), None)
    if taken is not None:
        raise PluginError(f"the name {name!r} is taken by the plugin {taken}; choose another")
    module = f"torchgraft_{name}"
    if find_spec(module) is not None:
        raise PluginError(f"the name {name!r} would give a module {module}, and there is one; choose another")
    target = Path(directory)
    refuse_existing(target)
    values = {
        "name": name,
        "module": module,
        "camel": "".join(word.capitalize() for word in name.split("_")),
        "distribution": distribution_of(name),
        "requirement": _requirement(__version__),
    }
    places = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "method.py": f"{module}.py",
        "test.py": f"tests/test_{name}.py",
    }
    with new_directory(target) as begun:
        for template, place in places.items():
            text = (files("torchgraft.plugin") / "templates" / f"{template}.txt").read_text(encoding="utf-8")
            (begun / place).parent.mkdir(exist_ok=True)
            (begun / place).write_text(Template(text).substitute(values), encoding="utf-8")
    return [target / place for place in places.values()]


def _requirement(version: str) -> str:
    """Return a requirement for this minor version, because before 1.0 the hooks can change with each one."""
    major, minor, *_ = map(int, re.findall(r"\d+", version))
    return f"torchgraft>={major}.{minor},<{major}.{minor + 1}"
