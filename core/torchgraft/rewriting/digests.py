"""SHA-256 of a checkpoint's tensors, taken in the background while something else keeps the main thread busy."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from torchgraft.checkpoint.reading import Checkpoint, became_shorter
from torchgraft.errors import FileFormatError

CHUNK = 1 << 24
"""Bytes that are read at a time."""

SWITCH = 1e-4
"""Seconds after which a thread lets another have a turn. Python's own 5 ms are long beside a block of rows."""


def digest_range(
    descriptor: int, begin: int, end: int, where: str, stopped: Callable[[], bool] = lambda: False, buffer: bytearray | None = None
) -> str:
    """Of the bytes from `begin` to `end` of an open file; empty if it was stopped.

    Args:
        buffer: to read into.

    Raises:
        FileFormatError: the file is shorter.
    """
    sha, room = hashlib.sha256(), memoryview(buffer or bytearray(min(CHUNK, end - begin)))
    while begin < end:
        if stopped():
            return ""
        read = os.preadv(descriptor, [room[: end - begin]], begin)
        if not read:
            raise became_shorter(where)
        sha.update(room[:read])
        begin += read
    return sha.hexdigest()


@contextmanager
def quick_turns() -> Iterator[None]:
    """A block in which threads wait for each other no longer than need be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def digesting(checkpoint: Checkpoint) -> Iterator[dict[str, str]]:
    """Fills the dictionary, tensor → digest, in the order of the files, until the block ends.

    What cannot be read is left out: whoever reads it next will say why.
    """
    found: dict[str, str] = {}
    stop = Event()
    thread = Thread(target=_digest_all, args=(checkpoint, found, stop.is_set), daemon=True)
    with quick_turns():
        thread.start()
        try:
            yield found
        finally:
            stop.set()
            thread.join()


def _digest_all(checkpoint: Checkpoint, found: dict[str, str], stopped: Callable[[], bool]) -> None:
    buffer = bytearray(CHUNK)
    for header in checkpoint.headers:
        try:
            with header.path.open("rb", buffering=0) as file:
                for entry in header.in_file_order:
                    digest = digest_range(file.fileno(), entry.begin, entry.end, entry.name, stopped, buffer)
                    if not digest:
                        return
                    found[entry.name] = digest
        except (OSError, FileFormatError):
            return
