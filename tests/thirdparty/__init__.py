"""Methods as third parties would write them: they use only public names of torchgraft."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torchgraft as tg

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NAMES = ("bitfit", "ia3", "loha", "oft", "vera")


def module_of(name: str) -> ModuleType:
    if name != "ia3":
        return import_module(f"thirdparty.{name}")
    home = str(EXAMPLES / "torchgraft-ia3")
    if home not in sys.path:
        sys.path.append(home)
    return import_module("torchgraft_ia3")


@contextmanager
def registered(*names: str) -> Iterator[None]:
    """A block in which these methods are installed."""
    for name in names:
        tg.registry().register(module_of(name), name)
    try:
        yield
    finally:
        for name in names:
            tg.registry().unregister(name)
