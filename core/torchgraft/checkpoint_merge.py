"""Merging an adapter into a checkpoint: files in, files out, one tensor in memory at a time, no model.

The output keeps the files, names and headers of the base; only the bytes of the merged tensors differ. Beside them lie
`torchgraft_merge.json`, which says what was merged, and `torchgraft_undo/`, which holds what unmerge needs.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import torchgraft
from torchgraft import exact
from torchgraft.adapter_files import NATIVE, PEFT_CONFIG, AdapterFiles, read_adapter
from torchgraft.adapter_load import read_tensors, warn_of_other_weights
from torchgraft.bases import base_of_checkpoint
from torchgraft.checkpoint import Checkpoint, open_checkpoint, read_json
from torchgraft.checkpoint_verify import SAMPLED_ROWS, verify_merge
from torchgraft.errors import FileFormatError, MergeError, TorchgraftWarning
from torchgraft.merge_job import Merge, Progress, prepare_on, relative_name, write_weights
from torchgraft.output import json_bytes, new_directory, refuse_existing
from torchgraft.pairing import pair
from torchgraft.sidecars import RECORD, UNDO, copy_into, sha256, sidecars

CORRECTIONS = "corrections.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class MergeReport:
    output: Path
    merged_tensors: int
    copied_tensors: int
    total_bytes: int
    """Of the weight files."""
    verified: bool
    left_out: tuple[str, ...] = ()
    """Files of the base that hold the same weights in another form, unmerged."""
    undo_bytes: int = 0


def merge_checkpoint(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    verify: bool = True,
    undo: bool = True,
    dry_run: bool = False,
    kinds: dict[str, str] | None = None,
    progress: Progress = lambda _: None,
) -> MergeReport:
    """Write `model` with `adapter` merged into it to the new directory `output`.

    Arithmetic is float32, rounded once to the tensor's dtype.

    Args:
        verify: read the written tensors back and compare sampled rows with a float64 reference.
        undo: write what `unmerge_checkpoint` needs.
        dry_run: check everything and write nothing.
        kinds: pattern → kind, for layers whose kind the files do not tell.

    Raises:
        FileFormatError, PairingError: a file is broken, or the adapter does not fit.
        MergeError: it is merged already, a weight is shared, or a result is not finite. Nothing is left behind.
    """
    target = Path(output)
    refuse_existing(target)
    merge = prepare(open_checkpoint(model), read_adapter(adapter), kinds)
    warn_of_other_weights(merge.pairing.files, [paired.site for paired in merge.pairing.sites])
    carried, left_out = sidecars(merge.checkpoint)
    if left_out:
        warnings.warn(
            f"left out, for they hold the unmerged weights in another form: {', '.join(map(str, left_out))}",
            TorchgraftWarning,
            stacklevel=2,
        )
    report = MergeReport(
        output=target,
        merged_tensors=len(merge.changed),
        copied_tensors=len(merge.checkpoint.tensors) - len(merge.changed),
        total_bytes=sum(header.path.stat().st_size for header in merge.checkpoint.headers),
        verified=verify and not dry_run,
        left_out=tuple(map(str, left_out)),
    )
    if dry_run:
        return report
    _check_space(target, report.total_bytes)
    merge.tensors = read_tensors(merge.pairing)
    with new_directory(target) as directory:
        corrections = _write_weights(merge, directory, undo, progress)
        for relative in carried:
            copy_into(merge.checkpoint.root / relative, directory / relative)
        if undo:
            _write_undo(merge, directory, corrections)
        if verify:
            verify_merge(merge, directory)
        (directory / RECORD).write_bytes(json_bytes(_record(merge, directory, str(model), carried, corrections, verify, undo)))
        undo_bytes = sum(path.stat().st_size for path in (directory / UNDO).rglob("*") if path.is_file())
    return MergeReport(**{**report.__dict__, "undo_bytes": undo_bytes})


def prepare(checkpoint: Checkpoint, files: AdapterFiles, kinds: dict[str, str] | None) -> Merge:
    """Pair adapter and checkpoint, and refuse what must not be merged."""
    base = base_of_checkpoint(checkpoint, kinds)
    _refuse_merged(checkpoint, files)
    return prepare_on(checkpoint, pair(files, base).demand(base), base)


def _refuse_merged(checkpoint: Checkpoint, files: AdapterFiles) -> None:
    if sha256(files.tensor_file) in _merged_before(checkpoint):
        raise MergeError(f"{checkpoint.root}: this adapter is merged into it already ({RECORD}); use the base model")


def _merged_before(checkpoint: Checkpoint) -> list[str]:
    """The hashes of the adapters that earlier merges put into this checkpoint."""
    path = checkpoint.directory / RECORD
    record = read_json(path, missing_ok=True)
    try:
        return [*record["earlier"], record["adapter"]["sha256"]] if record else []
    except (KeyError, TypeError):
        raise FileFormatError(f"{path}: it lacks what a merge's record must have; was it edited by hand?") from None


def _check_space(target: Path, needed: int) -> None:
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise FileFormatError(
            f"{target}: the disk has {free:,} bytes free, and the result takes {needed:,}; free some, or choose another output"
        )


def _write_weights(merge: Merge, directory: Path, undo: bool, progress: Progress) -> dict[str, exact.Correction]:
    corrections: dict[str, exact.Correction] = {}

    def change(name: str, original: Tensor) -> Tensor:
        merged = merge.merged(name, original)
        if undo:
            corrections[name] = _correction(merge, name, original, merged)
        return merged

    write_weights(merge.checkpoint, directory, merge.changed, change, progress)
    return corrections


def _correction(merge: Merge, name: str, original: Tensor, merged: Tensor) -> exact.Correction:
    if name in merge.replaced:  # nothing of the original is in the result: all of it is kept
        return exact.Correction(torch.empty(0, dtype=torch.int32), original.flatten(), exact.digest(original))
    needed = merge.undo_tensors(name, original)
    return exact.make_correction(original, merge.nearly_unmerged(name, merged, needed), needed)


def _write_undo(merge: Merge, directory: Path, corrections: dict[str, exact.Correction]) -> None:
    undo = directory / UNDO
    files = merge.pairing.files
    for name in (files.tensor_file.name, NATIVE, PEFT_CONFIG):
        if (files.directory / name).is_file():
            copy_into(files.directory / name, undo / "adapter" / name)
    sparse = {name: correction for name, correction in corrections.items() if name in merge.sites}
    tensors = {f"{name}#index": correction.index for name, correction in sparse.items()}
    tensors |= {f"{name}#value": correction.value for name, correction in corrections.items()}
    tensors |= {
        f"{name}#needed.{key}": tensor.contiguous() for name, correction in sparse.items() for key, tensor in correction.needed.items()
    }
    save_file(tensors, undo / CORRECTIONS, metadata={"format": "pt"})
    for relative in (RECORD, UNDO):  # of an earlier merge, which unmerging this one gives back
        earlier = merge.checkpoint.directory / relative
        if earlier.is_dir():
            shutil.copytree(earlier, undo / "base" / relative)
        elif earlier.is_file():
            copy_into(earlier, undo / "base" / relative)


def _record(
    merge: Merge, directory: Path, model: str, carried: list[Path], corrections: dict[str, exact.Correction], verified: bool, undo: bool
) -> dict[str, Any]:
    checkpoint, files = merge.checkpoint, merge.pairing.files
    weights = {relative_name(checkpoint, header).as_posix(): header.path for header in checkpoint.headers}
    everything = weights | {path.as_posix(): checkpoint.root / path for path in carried}
    return {
        "format": FORMAT,
        "torchgraft": torchgraft.__version__,
        "base": model,
        "adapter": {"path": str(files.directory), "method": merge.pairing.method.name, "sha256": sha256(files.tensor_file)},
        "sites": {paired.site.name: {"kind": paired.site.kind.name} for paired in merge.sites.values()},
        "earlier": _merged_before(checkpoint),
        "merged_tensors": sorted(merge.changed),
        "undo": undo,
        "corrections": sha256(directory / UNDO / CORRECTIONS) if undo else "",
        "original_tensors": {name: correction.digest for name, correction in corrections.items()},
        "original_files": {name: sha256(path) for name, path in everything.items()} if undo else {},
        "verified": f"up to {SAMPLED_ROWS} rows of each merged tensor against a float64 reference" if verified else "",
    }
