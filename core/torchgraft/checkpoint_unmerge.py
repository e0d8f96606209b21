"""Taking a merge back: from the merged directory alone to every file of the base, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from torchgraft import exact
from torchgraft.adapter_files import read_adapter
from torchgraft.adapter_load import read_tensors
from torchgraft.bases import base_of_checkpoint
from torchgraft.checkpoint import Checkpoint, open_checkpoint, read_json
from torchgraft.checkpoint_merge import CORRECTIONS, FORMAT
from torchgraft.dtypes import ADAPTABLE
from torchgraft.errors import FileFormatError, MergeError
from torchgraft.merge_job import Merge, Progress, prepare_on, relative_name, write_weights
from torchgraft.output import new_directory, refuse_existing
from torchgraft.pairing import pair
from torchgraft.sidecars import RECORD, UNDO, copy_into, sha256, sidecars


@dataclass(frozen=True)
class UnmergeReport:
    output: Path
    restored_tensors: int
    copied_tensors: int
    files: int
    """How many files were compared with the hash of the original."""


def unmerge_checkpoint(merged: str | Path, output: str | Path, *, progress: Progress = lambda _: None) -> UnmergeReport:
    """Write the base of `merged` to the new directory `output`. Every file has the hash of the original, or it is refused.

    Raises:
        MergeError: the directory was not merged here or without an undo record, or was changed since.
        FileFormatError: a file is broken.
    """
    target = Path(output)
    refuse_existing(target)
    checkpoint = open_checkpoint(merged)
    record = _read_record(checkpoint)
    merge, corrections = _prepare(checkpoint, record)
    carried, _ = sidecars(checkpoint)
    with new_directory(target) as directory:
        originals = record["original_tensors"]
        write_weights(
            checkpoint, directory, originals, lambda name, tensor: _restored(merge, corrections, name, tensor, originals[name]), progress
        )
        for relative in carried:
            if relative.as_posix() in record["original_files"]:
                copy_into(checkpoint.root / relative, directory / relative)
        _check_files(record, directory, checkpoint)
        earlier = checkpoint.directory / UNDO / "base"
        for path in sorted(earlier.rglob("*")):
            if path.is_file() and path.relative_to(earlier).parts[0] in (RECORD, UNDO):
                copy_into(path, directory / path.relative_to(earlier))
    restored = len(record["original_tensors"])
    return UnmergeReport(target, restored, len(checkpoint.tensors) - restored, len(record["original_files"]))


def _read_record(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.directory / RECORD
    record = read_json(path, missing_ok=True)
    if not record:
        raise MergeError(f"{checkpoint.root}: no {RECORD} in it, so it was not merged by torchgraft; there is nothing to take back")
    if record.get("format") != FORMAT:
        raise FileFormatError(f"{path}: format {record.get('format')!r}; this version reads {FORMAT}: upgrade torchgraft")
    if not record.get("undo"):
        raise MergeError(f"{checkpoint.root}: it was merged with --no-undo, so the original bits are not in it; take the base model")
    maps = (record.get("original_tensors"), record.get("original_files"), record.get("sites"))
    weights = {relative_name(checkpoint, header).as_posix() for header in checkpoint.headers}
    sound = all(isinstance(value, dict) for value in maps) and weights <= record["original_files"].keys()
    if not sound or not all(isinstance(site, dict) and isinstance(site.get("kind"), str) for site in record["sites"].values()):
        raise FileFormatError(f"{path}: it lacks what a merge's record must have; was it edited by hand?")
    return record


def _prepare(checkpoint: Checkpoint, record: Mapping[str, Any]) -> tuple[Merge, dict[str, Tensor]]:
    undo = checkpoint.directory / UNDO
    base = base_of_checkpoint(checkpoint)
    # What the merge took each layer for, --kind included.
    kinds = {
        name: replace(layer, kind=site["kind"])
        for name, site in record["sites"].items()
        if (layer := base.layers.get(name)) and layer.has_weight and layer.dtype in ADAPTABLE
    }
    # The weights here are the merged ones: hashes, not samples, will tell whether the right bits come out.
    base = replace(base, layers={**base.layers, **kinds}, fingerprint=lambda _: "")
    merge = prepare_on(checkpoint, pair(read_adapter(undo / "adapter"), base).demand(base), base)
    merge.tensors = read_tensors(merge.pairing)
    if not (undo / CORRECTIONS).is_file() or sha256(undo / CORRECTIONS) != record.get("corrections"):
        raise FileFormatError(f"{undo / CORRECTIONS}: it is missing or was changed since the merge; copy the merged directory again")
    corrections = open_checkpoint(undo / CORRECTIONS)
    return merge, {name: corrections.read(name) for name in corrections.tensors}


def _restored(merge: Merge, corrections: Mapping[str, Tensor], name: str, merged: Tensor, digest: str) -> Tensor:
    if f"{name}#value" not in corrections or not (name in merge.replaced or f"{name}#index" in corrections):
        raise FileFormatError(f"{merge.checkpoint.directory / UNDO / CORRECTIONS}: it has no entry for {name!r}")
    value = corrections[f"{name}#value"]
    if name in merge.replaced:
        return value.reshape(merged.shape)
    correction = exact.Correction(corrections[f"{name}#index"], value, digest)
    prefix = f"{name}#needed."
    needed = {key.removeprefix(prefix): tensor for key, tensor in corrections.items() if key.startswith(prefix)}
    return exact.correct(merge.nearly_unmerged(name, merged, needed), correction, name)


def _check_files(record: Mapping[str, Any], directory: Path, checkpoint: Checkpoint) -> None:
    for name, expected in record["original_files"].items():
        path = directory / name
        if not path.is_file():
            raise MergeError(f"{checkpoint.root}: {name} is missing, so the original cannot be given back whole")
        if sha256(path) != expected:
            raise MergeError(
                f"{checkpoint.root / name}: it was changed since the merge, so the original cannot be given back. Nothing was left behind"
            )
