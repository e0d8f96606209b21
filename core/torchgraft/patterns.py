"""Match regular expressions that come from files, in bounded time and memory.

Python's `re` can take exponential time, so a file could make a command hang. Here `re` only decides whether an expression is valid; the
`regex` package matches it, with a timeout. Both backtrack in the same order and find the same matches.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import deque
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from torchgraft.errors import PairingError

if TYPE_CHECKING:
    import regex

PLAIN = re.compile(r"(?:[\w.|-]|\\[.-])*")
"""Names and alternatives of names. `re` matches them in linear time."""
COUNTED = re.compile(r"\{(\d*),?(\d*)\}")
REPEATS = 10_000
"""Largest product of the numbers of counted repeats; `regex` expands them."""
SLOW = 0.01
"""Seconds from which a match counts as slow. Matching an ordinary expression with a name takes microseconds."""
WINDOW, ALLOWED = 10.0, 2.0
"""All slow matches within the window may take so many seconds together."""

_slow: deque[tuple[float, float]] = deque()
"""(time, seconds) of the slow matches within the window."""


def match(expression: str, text: str, *, around: tuple[str, str] | None = None) -> re.Match[str] | regex.Match[str] | None:
    """Match the whole text as `re.fullmatch` does; with `around`, match at the start of the text as `re.match` does.

    Args:
        around: what stands before and after the expression; not from a file.

    Raises:
        PairingError: the expression is invalid, or takes too long.
    """
    if PLAIN.fullmatch(expression):
        complete = expression.join(around or ("", ""))
        return re.match(complete, text) if around else re.fullmatch(complete, text)
    compiled = _compiled(expression, around or ("", ""))
    start = time.monotonic()
    try:
        left = ALLOWED - _recent(start)
        if left <= 0:
            raise TimeoutError
        return compiled.match(text, timeout=left) if around else compiled.fullmatch(text, timeout=left)
    except TimeoutError:
        raise PairingError(f"matching {_shown(expression)} with {_shown(text)} takes too long; write the names as a list") from None
    finally:
        if (seconds := time.monotonic() - start) > SLOW:
            _slow.append((start, seconds))


def _recent(now: float) -> float:
    while _slow and _slow[0][0] < now - WINDOW:
        _slow.popleft()
    return sum(seconds for _, seconds in _slow)


@lru_cache(maxsize=4096)
def _compiled(expression: str, around: tuple[str, str]) -> regex.Pattern[str]:
    import regex  # takes 20 ms, and few adapters need it

    if prod(max(1, int(number[-5:])) for pair in COUNTED.findall(expression) for number in pair if number) > REPEATS:
        raise PairingError(f"{_shown(expression)} repeats too often; write the names as a list")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of sets that a later version will read in another way
            re.compile(expression.join(around))
        return regex.compile(_without_extensions(expression.join(around)))
    except (re.error, regex.error, FutureWarning, OverflowError) as error:
        raise PairingError(f"{_shown(expression)} is not a regular expression: {error}") from None
    except RecursionError:
        raise PairingError(f"{_shown(expression)} is nested too deeply") from None


def _without_extensions(expression: str) -> str:
    """Escape braces that `re` takes literally and `regex` does not: "{e<=1}" allows errors there."""
    return re.sub(r"(\\.)|\{(?!\d*,?\d*\})", lambda found: found[1] or r"\{", expression, flags=re.DOTALL)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
