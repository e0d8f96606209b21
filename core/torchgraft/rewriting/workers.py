"""Write weight files tensor by tensor, on all cores. Changed tensors pass through memory a few rows at a time."""

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
from torchgraft.rewriting.digests import digest_range, quick_turns
from torchgraft.rewriting.file_tensors import FileTensor

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS = 8
"""Maximum number of threads. Each needs memory for its rows, and with more of them the disk is the bottleneck."""


class StoppedError(Exception):
    """Raised in a worker to stop it after another worker failed or the user interrupted."""


class Workers:
    """Threads that process a list of items; results are returned in the order of the items.

    While they run, torch computes with one thread in the whole process, because their blocks are too small to be divided further.
    """

    def __init__(self, total: int = 0, progress: Progress = silent) -> None:
        self.count = min(MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._stop = Event()
        self._lock = Lock()
        self._total, self._progress = total, progress

    def stopped(self) -> bool:
        return self._stop.is_set()

    def advance(self, nbytes: int) -> None:
        """Report progress, from any thread.

        Raises:
            StoppedError: another worker failed.
        """
        if self._stop.is_set():
            raise StoppedError
        with self._lock:
            self._progress(nbytes, self._total)

    def digest(self, descriptor: int, begin: int, end: int, where: str) -> str:
        """Return the SHA-256 of these bytes of an open file, from any thread.

        Raises:
            StoppedError: another worker failed.
            FileFormatError: the file is shorter.
        """
        found = digest_range(descriptor, begin, end, where, self.stopped)
        if not found:
            raise StoppedError
        return found

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
        """Call `work` on each item and yield the results in the order of the items. The first error stops all workers and is raised."""

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
                    if len(waiting) > 2 * self.count:  # bound the memory of results that are not consumed yet
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
    """Yield the original errors, without the StoppedErrors that follow from them."""
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
    """Make glibc reuse freed blocks of rows from the heap.

    Freeing one block just under 32 MiB raises glibc's dynamic mmap threshold to its maximum. Later blocks are then reused instead of
    being unmapped and faulted in again, which costs more than the arithmetic.
    """
    torch.empty((1 << 25) - (1 << 16), dtype=torch.uint8)


def start_files(layout: Layout, directory: Path) -> None:
    """Create every output file at its full size, with its header."""
    for file in layout.files:
        path = directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as target:
            target.write(file.header)
            target.truncate(file.nbytes)


@contextmanager
def opened(checkpoint: Checkpoint, directory: Path, file: OutputFile, placed: Placed) -> Iterator[tuple[FileTensor, FileTensor]]:
    """Open a tensor's source and target files; yield its place in both."""
    entry = checkpoint.tensors[placed.source]
    path = checkpoint.file_of[placed.source]
    with path.open("rb", buffering=0) as source, (directory / file.name).open("r+b", buffering=0) as target:
        yield (
            FileTensor(source.fileno(), entry.begin, entry.shape, entry.dtype, f"{path}: {entry.name}"),
            FileTensor(target.fileno(), placed.begin, placed.shape, placed.dtype, f"{file.name}: {placed.name}"),
        )
