"""Writing weight files tensor by tensor, on all cores at once: what changes goes through memory, a few rows at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import TypeVar

import torch

from torchgraft.checkpoint.layout import Layout, OutputFile, Placed
from torchgraft.checkpoint.reading import Checkpoint
from torchgraft.disk import Progress, silent
from torchgraft.rewriting.digests import quick_turns
from torchgraft.rewriting.file_tensors import FileTensor

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS = 8
"""Each takes memory for its rows, and past this the disk is what is waited for."""


class StoppedError(Exception):
    """Another worker failed, or the user interrupted: this one gives up."""


class Workers:
    """Threads that work on a list of items; the results come in the order of the items.

    torch computes with one thread in each of them: their blocks are too small to be divided further.
    """

    def __init__(self, total: int = 0, progress: Progress = silent) -> None:
        self.count = min(MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._stop = Event()
        self._lock = Lock()
        self._total, self._progress = total, progress

    def stopped(self) -> bool:
        return self._stop.is_set()

    def advance(self, nbytes: int) -> None:
        """Tell the progress, from any thread.

        Raises:
            StoppedError: there is no point in going on.
        """
        if self._stop.is_set():
            raise StoppedError
        with self._lock:
            self._progress(nbytes, self._total)

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
        """`work` on each item. The first error stops all, and is raised."""

        def stopping(item: Item) -> Result:
            try:
                return work(item)
            except BaseException:
                self._stop.set()
                raise

        with _one_torch_thread(), ThreadPoolExecutor(self.count) as pool:
            waiting: deque[Future[Result]] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(stopping, item))
                    if len(waiting) > 2 * self.count:  # results that nobody has taken yet are kept in memory
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException as error:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, StoppedError):
                    raise next(_errors(waiting), error) from None
                raise


def _errors(futures: Iterable[Future[Result]]) -> Iterator[BaseException]:
    """What went wrong first, for StoppedError only follows from it."""
    found = (future.exception() for future in futures if not future.cancelled())
    return (error for error in found if error is not None and not isinstance(error, StoppedError))


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _keep_freed_memory()
    try:
        with quick_turns():
            yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """glibc gives memory back to the system when a block of rows is done, and fetching it anew costs more than the arithmetic.

    It keeps as much as the largest piece that was ever freed: one of the largest size that it goes by.
    """
    torch.empty((1 << 25) - (1 << 16), dtype=torch.uint8)


def start_files(layout: Layout, directory: Path) -> None:
    """Every output file with its header, and room for the tensors."""
    for file in layout.files:
        path = directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as target:
            target.write(file.header)
            target.truncate(file.nbytes)


@contextmanager
def opened(checkpoint: Checkpoint, directory: Path, file: OutputFile, placed: Placed) -> Iterator[tuple[FileTensor, FileTensor]]:
    """Where a tensor is read, and where it is written."""
    entry = checkpoint.tensors[placed.source]
    path = checkpoint.file_of[placed.source]
    with path.open("rb", buffering=0) as source, (directory / file.name).open("r+b", buffering=0) as target:
        yield (
            FileTensor(source.fileno(), entry.begin, entry.shape, entry.dtype, f"{path}: {entry.name}"),
            FileTensor(target.fileno(), placed.begin, placed.shape, placed.dtype, f"{file.name}: {placed.name}"),
        )
