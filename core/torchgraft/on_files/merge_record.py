"""What a merge writes down: `torchgraft_merge.json`, and beside it `torchgraft_undo/` with what unmerging needs.

torchgraft_undo/adapters/N/…              the adapters, in the order in which they were merged
torchgraft_undo/headers/FILE.header       the header of each weight file of the base
torchgraft_undo/base/…                    the base's own of those other files that the merge changed
torchgraft_undo/corrections.safetensors   where arithmetic alone would miss the original bits
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchgraft.adapter_files.reading import AdapterFiles
from torchgraft.checkpoint.reading import Checkpoint
from torchgraft.checkpoint.sidecars import RECORD
from torchgraft.disk import leaves_directory, read_json
from torchgraft.errors import FileFormatError, MergeError
from torchgraft.hashes import sha256_of_file

FORMAT = 2
ADAPTERS, HEADERS, BASE = "adapters", "headers", "base"
CORRECTIONS = "corrections.safetensors"
TYPES = {
    "adapters": list,
    "sites": dict,
    "earlier": list,
    "undo": bool,
    "headers": dict,
    "original_tensors": dict,
    "original_files": dict,
    "merged_tensors": list,
}


def read_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """The record of the merge that made this checkpoint; empty if it was not merged here.

    Raises:
        FileFormatError: it is not what a merge writes.
    """
    path = checkpoint.directory / RECORD
    record = read_json(path, missing_ok=True)
    if not record:
        return {}
    if record.get("format") != FORMAT:
        raise FileFormatError(f"{path}: format {record.get('format')!r}; this version reads {FORMAT}: upgrade torchgraft")
    sound = all(isinstance(record.get(key), kind) for key, kind in TYPES.items())
    if not sound or not all(_is_adapter(entry) for entry in record["adapters"]) or not all(map(_is_site, record["sites"].values())):
        raise FileFormatError(f"{path}: it lacks what a merge's record must have; was it edited by hand?")
    return record


def _is_adapter(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("factor"), int | float)
        and _is_map(entry.get("names"))
    )


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


def _is_site(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("kind"), str) and isinstance(entry.get("quantization"), dict)


def adapters_in(checkpoint: Checkpoint) -> list[str]:
    """The hashes of the adapters that this and earlier merges put into the checkpoint."""
    record = read_record(checkpoint)
    return [*record["earlier"], *(entry["sha256"] for entry in record["adapters"])] if record else []


def merged_already(checkpoint: Checkpoint, files: AdapterFiles) -> str:
    """Says so if this adapter is in the checkpoint already; else empty."""
    before = adapters_in(checkpoint)
    if before and sha256_of_file(files.tensor_file) in before:
        return f"{checkpoint.root}: the adapter {files.directory} is merged into it already ({RECORD}); use the base model"
    return ""


def refuse_merged(checkpoint: Checkpoint, files: AdapterFiles) -> None:
    """
    Raises:
        MergeError: this adapter is in the checkpoint already.
    """
    if problem := merged_already(checkpoint, files):
        raise MergeError(problem)


def inside(directory: Path, name: str) -> Path:
    """The file `name` of a record, which may not lie outside `directory`.

    Raises:
        FileFormatError: it does.
    """
    if not name or leaves_directory(name):
        raise FileFormatError(f"{directory}: the record names {name!r}, which lies outside; refused")
    return directory / name
