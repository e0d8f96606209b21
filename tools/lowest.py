"""Print the lowest versions that pyproject.toml allows, as constraints for pip: `make test-lowest` runs the tests with them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("hf",)
"""The extras that users install and the tests run with."""


def lowest(requirements: list[str]) -> list[str]:
    """["torch>=2.6", "numpy"] → ["torch==2.6"]."""
    bounds = (re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement) for requirement in requirements)
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["dependencies"] + [each for extra in EXTRAS for each in project["optional-dependencies"][extra]]
    print("\n".join(lowest(declared)))
