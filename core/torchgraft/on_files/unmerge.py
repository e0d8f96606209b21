"""Undo a merge: restore every file of the base bit for bit, from the merged directory alone or from the base."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torchgraft.checkpoint.layout import OutputFile, Placed
from torchgraft.checkpoint.reading import open_checkpoint
from torchgraft.checkpoint.sidecars import RECORD
from torchgraft.disk import Progress, check_space, copy_into, new_directory, refuse_existing, refuse_inside, silent
from torchgraft.errors import MergeError
from torchgraft.hashes import sha256_of_bytes, sha256_of_file
from torchgraft.on_files.merge_record import MergeRecord, inside, read_record
from torchgraft.on_files.origin import BaseOrigin, MergedOrigin, Origin
from torchgraft.rewriting.workers import Workers, opened, start_files


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
        _write_weights(origin, record.original_tensors, directory, progress)
        _write_other_files(origin, record.original_files, directory)
    restored = sum(map(origin.is_restored, record.original_tensors))
    copied = len(record.original_tensors) - restored
    files = len(origin.layout.files) + len(record.original_files)
    return UnmergeReport(target, restored, copied, files, from_base=base is not None)


def _check_origin(origin: Origin, record: MergeRecord) -> None:
    """Check that the headers of the base's weight files and its tensors' names are those that the merge recorded.

    Raises:
        MergeError: they are not.
    """
    found = {file.name: sha256_of_bytes(file.header) for file in origin.layout.files}
    if found != record.headers:
        raise MergeError(
            f"{origin.checkpoint.root}: the saved headers of the base's weight files are missing or do not match the record; "
            "the base cannot be restored"
        )
    names = {placed.name for placed in origin.layout.tensors}
    if odd := sorted(names ^ record.original_tensors.keys()):
        raise MergeError(f"{origin.checkpoint.root}: tensor {odd[0]} of the base is missing here, so the base cannot be restored")


def _write_weights(origin: Origin, hashes: Mapping[str, str], directory: Path, progress: Progress) -> None:
    """Write the weight files of the base into `directory`, and check the hash of every tensor.

    Raises:
        MergeError: a tensor is not that of the base.
    """
    workers = Workers(origin.layout.nbytes, progress)
    start_files(origin.layout, directory)

    def write(job: tuple[OutputFile, Placed]) -> tuple[Placed, str]:
        file, placed = job
        with opened(origin.checkpoint, directory, file, placed) as (source, target):
            return placed, origin.write(source, target, placed, workers)

    with closing(workers.map(write, [(file, placed) for file in origin.layout.files for placed in file.tensors])) as results:
        for placed, found in results:
            if found != hashes[placed.name]:
                raise origin.refused(placed.name)


def _write_other_files(origin: Origin, hashes: Mapping[str, str], directory: Path) -> None:
    """Copy the files beside the weights, the record of an earlier merge included, and check their hashes.

    Raises:
        MergeError: a file is missing, or is not that of the base.
    """
    for name, expected in hashes.items():
        source, target = origin.file(name), inside(directory, name)
        if not source.is_file():
            raise MergeError(f"{origin.checkpoint.root}: {name} is missing, so the base cannot be restored")
        copy_into(source, target)
        if sha256_of_file(target) != expected:
            raise MergeError(f"{source}: this file changed after the merge, so the base cannot be restored. Nothing was written")
