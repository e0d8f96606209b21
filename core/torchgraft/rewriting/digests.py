"""Compute the SHA-256 of a checkpoint's tensors in the background, while the main thread does something else."""

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
"""Size of a read, in bytes."""

SWITCH = 1e-4
"""Interpreter's thread switch interval, in seconds. Python's default of 5 ms is long compared with the work on a block of rows."""


def digest_range(
    descriptor: int, begin: int, end: int, where: str, stopped: Callable[[], bool] = lambda: False, buffer: bytearray | None = None
) -> str:
    """Return the SHA-256 of the bytes from `begin` to `end` of an open file; empty if it was stopped.

    Args:
        where: the tensor's name, for the message.
        buffer: memory to read into; allocated if not given.

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
    """Lower the interpreter's thread switch interval to `SWITCH` while the block runs. It affects the whole process."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def digesting(checkpoint: Checkpoint) -> Iterator[dict[str, str]]:
    """Fill the yielded dictionary, tensor → SHA-256, in the order of the files, until the block ends.

    Tensors that cannot be read are skipped: the code that reads them next reports the error.
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
