"""The record of a merge, `torchgraft_merge.json`, and where `torchgraft_undo/` beside it stores what unmerging needs.

torchgraft_undo/adapters/N/…              the adapters, in the order in which they were merged
torchgraft_undo/headers/FILE.header       the header of each weight file of the base
torchgraft_undo/base/…                    the base's version of each other file that the merge changed
torchgraft_undo/corrections.safetensors   the differences between the base and what arithmetic alone restores
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torchgraft.adapter_files.reading import AdapterFiles
from torchgraft.adapter_files.record import Entry, validated
from torchgraft.checkpoint.reading import Checkpoint
from torchgraft.checkpoint.sidecars import RECORD
from torchgraft.disk import json_bytes, leaves_directory, read_json
from torchgraft.errors import FileFormatError, MergeError
from torchgraft.hashes import sha256_of_bytes, sha256_of_file

FORMAT = 3
WITHOUT_CHECKSUM = 2
"""An earlier format, which is still read."""
ADAPTERS, HEADERS, BASE = "adapters", "headers", "base"
CHECKSUM = "checksum"
CORRECTIONS = "corrections.safetensors"


class MergedAdapter(Entry):
    """One adapter that was merged."""

    sha256: str
    """Hash of its tensor file."""
    factor: float
    names: dict[str, str]
    """The adapter's names of the base's tensors → the base's names; empty if they are the same."""


class MergedLayer(Entry):
    """What the merge took one layer for."""

    kind: str
    quantization: dict[str, Any]


class MergeRecord(Entry):
    """The whole record."""

    adapters: list[MergedAdapter]
    sites: dict[str, MergedLayer]
    earlier: list[str]
    """Hashes of the adapters of earlier merges."""
    undo: bool
    """Whether an undo record was written."""
    headers: dict[str, str]
    """Weight file of the base → hash of its header."""
    original_tensors: dict[str, str]
    """Tensor of the base → its hash."""
    original_files: dict[str, str]
    """Other file of the base → its hash."""
    merged_tensors: list[str]


def read_record(checkpoint: Checkpoint) -> MergeRecord | None:
    """Return the record of the merge that made this checkpoint, or None if torchgraft did not merge it.

    Raises:
        FileFormatError: the record is not one that a merge writes.
    """
    path = checkpoint.directory / RECORD
    document = read_json(path, missing_ok=True)
    if not document:
        return None
    if document.get("format") not in (FORMAT, WITHOUT_CHECKSUM):
        raise FileFormatError(f"{path}: format {document.get('format')!r}; this version reads {FORMAT}: upgrade torchgraft")
    if document["format"] == FORMAT and document.get(CHECKSUM) != checksum(document):
        raise FileFormatError(f"{path}: invalid record: it changed after the merge (its checksum differs); copy the merged directory again")
    return validated(MergeRecord, path, document)


def checksum(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record without its checksum, so that a changed or lost entry is noticed."""
    return sha256_of_bytes(json_bytes({key: value for key, value in document.items() if key != CHECKSUM}))


def adapters_in(checkpoint: Checkpoint) -> list[str]:
    """Return the hashes of the adapters that this and earlier merges wrote into the checkpoint."""
    record = read_record(checkpoint)
    return [*record.earlier, *(adapter.sha256 for adapter in record.adapters)] if record else []


def merged_already(checkpoint: Checkpoint, files: AdapterFiles) -> str:
    """Return the problem if this adapter is already merged into the checkpoint, else an empty string."""
    before = adapters_in(checkpoint)
    if before and sha256_of_file(files.tensor_file) in before:
        return f"{checkpoint.root}: the adapter {files.directory} is merged into it already ({RECORD}); use the base model"
    return ""


def refuse_merged(checkpoint: Checkpoint, files: AdapterFiles) -> None:
    """Check that the adapter is not merged into the checkpoint yet.

    Raises:
        MergeError: it is.
    """
    if problem := merged_already(checkpoint, files):
        raise MergeError(problem)


def check_names(path: Path, record: MergeRecord) -> None:
    """Check the names of files that the record, read from `path`, states.

    Raises:
        FileFormatError: it has no weight file, one that is not called .safetensors, or a name twice in different spellings.
    """
    if not record.headers:
        raise FileFormatError(f"{path}: invalid record: it names no weight file of the base")
    names = [*record.headers, *record.original_files]
    for name in names:
        if name != PurePosixPath(name).as_posix() or name.endswith(".safetensors") < (name in record.headers):
            raise FileFormatError(f"{path}: invalid record: {name!r} cannot be a weight file's name or another file's")
    if len(set(names)) < len(names) or any(parent in names for name in names for parent in _parents(name)):
        raise FileFormatError(f"{path}: invalid record: it names one file twice")


def _parents(name: str) -> list[str]:
    """Return the directories that the path implies."""
    return [parent.as_posix() for parent in PurePosixPath(name).parents if parent.name]


def inside(directory: Path, name: str) -> Path:
    """Return the path of the file `name`, which a record states, inside `directory`.

    Raises:
        FileFormatError: the name leads outside.
    """
    if not name or leaves_directory(name):
        raise FileFormatError(f"{directory}: the record names {name!r}, which is outside; refused")
    return directory / name
