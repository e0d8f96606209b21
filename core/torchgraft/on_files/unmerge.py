"""Undo a merge: restore every file of the base bit for bit, from the merged directory alone or from the base."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torchgraft.checkpoint.layout import OutputFile, Placed
from torchgraft.checkpoint.reading import open_checkpoint
from torchgraft.checkpoint.sidecars import RECORD
from torchgraft.disk import Progress, check_space, copy_into, new_directory, refuse_existing, refuse_inside, silent
from torchgraft.errors import MergeError
from torchgraft.hashes import sha256_of_bytes, sha256_of_file
from torchgraft.on_files.merge_record import MergeRecord, check_names, inside, read_record
from torchgraft.on_files.origin import BaseOrigin, MergedOrigin, Origin
from torchgraft.rewriting.workers import Workers, opened, start_files

Job = tuple[OutputFile, Placed]


@dataclass(frozen=True)
class UnmergeReport:
    output: Path
    restored_tensors: int
    copied_tensors: int
    files: int
    """Number of files whose hashes were compared with those of the base."""
    from_base: bool
    """Whether the bits come from a base that was given, and not from the merged directory."""


def unmerge_checkpoint(
    merged: str | Path, output: str | Path, *, base: str | Path | None = None, progress: Progress = silent
) -> UnmergeReport:
    """Restore the base of `merged` in the new directory `output`, or nothing if a tensor or file has not the hash that the merge recorded.

    While it runs, torch computes with one thread and Python's thread switch interval is 0.1 ms, in the whole process; both are
    restored. glibc's mmap threshold stays at its maximum afterwards.

    Args:
        base: copy the tensors from this checkpoint: needed if the merge wrote no undo record, or if arithmetic on its machine differs.

    Raises:
        MergeError: torchgraft did not merge this directory, it has no undo record and `base` is not given, or a restored hash differs.
        FileFormatError: a file is broken.
    """
    target = Path(output)
    refuse_existing(target)
    checkpoint = open_checkpoint(merged)
    refuse_inside(target, checkpoint.root)
    record = read_record(checkpoint)
    if record is None:
        raise MergeError(f"{checkpoint.root}: no {RECORD} in it, so it was not merged by torchgraft and cannot be unmerged")
    if base is None and not record.undo:
        raise MergeError(f"{checkpoint.root}: it was merged with --no-undo, so the original bits are not in it; give the base: --base DIR")
    origin: Origin = BaseOrigin(open_checkpoint(base)) if base is not None else MergedOrigin(checkpoint, record)
    _check_origin(origin, record)
    check_space(target, origin.layout.nbytes)
    with new_directory(target) as directory:
        workers = Workers(origin.layout.nbytes, progress)
        _write_weights(origin, directory, workers)
        _write_other_files(origin, record.original_files, directory)
        # Only now, so that nothing is written after it was checked.
        _check_weights(origin, record.original_tensors, directory, workers)
        _check_other_files(origin, record.original_files, directory)
    restored = sum(map(origin.is_restored, record.original_tensors))
    copied = len(record.original_tensors) - restored
    files = len(origin.layout.files) + len(record.original_files)
    return UnmergeReport(target, restored, copied, files, from_base=base is not None)


def _check_origin(origin: Origin, record: MergeRecord) -> None:
    """Check that the headers of the base's weight files and its tensors' names are those that the merge recorded.

    Raises:
        MergeError: they are not.
        FileFormatError: the record names files that no base has.
    """
    check_names(origin.checkpoint.directory / RECORD, record)
    found = {file.name: sha256_of_bytes(file.header) for file in origin.layout.files}
    if found != record.headers:
        raise MergeError(
            f"{origin.checkpoint.root}: the saved headers of the base's weight files are missing or do not match the record; "
            "the base cannot be restored"
        )
    placed = [tensor.name for tensor in origin.layout.tensors]
    names = set(placed)
    if len(names) < len(placed):
        raise MergeError(f"{origin.checkpoint.root}: the saved headers have a tensor twice, so the base cannot be restored")
    if odd := sorted(names ^ record.original_tensors.keys()):
        raise MergeError(f"{origin.checkpoint.root}: tensor {odd[0]} of the base is missing here, so the base cannot be restored")


def _write_weights(origin: Origin, directory: Path, workers: Workers) -> None:
    """Write the weight files of the base into `directory`."""

    def write(job: Job) -> None:
        with opened(origin.checkpoint, directory, *job) as (source, target):
            origin.write(source, target, job[1], workers)

    start_files(origin.layout, directory)
    with closing(workers.map(write, _jobs(origin))) as done:
        for _ in done:
            pass


def _check_weights(origin: Origin, hashes: Mapping[str, str], directory: Path, workers: Workers) -> None:
    """Check the size and header of every weight file that was written, and the hash of every tensor.

    Raises:
        MergeError: a tensor or a header is not that of the base.
    """

    def digest(job: Job) -> tuple[str, str]:
        file, placed = job
        with (directory / file.name).open("rb", buffering=0) as written:
            return placed.name, workers.digest(written.fileno(), placed.begin, placed.begin + placed.nbytes, placed.name)

    with closing(workers.map(digest, _jobs(origin))) as results:
        for name, found in results:
            if found != hashes[name]:
                raise origin.refused(name)
    for file in origin.layout.files:
        with (directory / file.name).open("rb") as written:
            if written.read(len(file.header)) != file.header or os.fstat(written.fileno()).st_size != file.nbytes:
                raise MergeError(f"{file.name}: the written header is not that of the base: is the disk at fault? Nothing was written")


def _jobs(origin: Origin) -> list[Job]:
    return [(file, placed) for file in origin.layout.files for placed in file.tensors]


def _write_other_files(origin: Origin, names: Iterable[str], directory: Path) -> None:
    """Copy the files beside the weights, the record of an earlier merge included.

    Raises:
        MergeError: a file is missing.
    """
    for name in names:
        source = origin.file(name)
        if not source.is_file():
            raise MergeError(f"{origin.checkpoint.root}: {name} is missing, so the base cannot be restored")
        copy_into(source, inside(directory, name))


def _check_other_files(origin: Origin, hashes: Mapping[str, str], directory: Path) -> None:
    """Check the hashes of the files beside the weights.

    Raises:
        MergeError: a file is not that of the base.
    """
    for name, expected in hashes.items():
        if sha256_of_file(directory / name) != expected:
            raise MergeError(f"{origin.file(name)}: this file changed after the merge, so the base cannot be restored. Nothing was written")
