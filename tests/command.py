"""The type of the fixture `adapt`, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Adapt = Callable[..., Result]
