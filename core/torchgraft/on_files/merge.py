"""Merging adapters into a checkpoint: files in, files out, a few rows in memory at a time, no model.

Unless asked otherwise, the output keeps the files, names and headers of the base; only the bytes of the merged tensors
differ. Beside them are `torchgraft_merge.json`, which records the merge, and `torchgraft_undo/`, which contains what
unmerge needs.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchgraft.adapter_files.reading import NATIVE, PEFT_CONFIG
from torchgraft.checkpoint.layout import relative_name
from torchgraft.checkpoint.reading import open_checkpoint
from torchgraft.checkpoint.sidecars import RECORD, UNDO
from torchgraft.disk import (
    Progress,
    check_space,
    copy_into,
    json_bytes,
    new_directory,
    refuse_existing,
    refuse_inside,
    silent,
    space_problem,
)
from torchgraft.errors import MergeError, TorchgraftWarning
from torchgraft.hashes import sha256_of_bytes, sha256_of_file
from torchgraft.on_files.merge_changes import Onto
from torchgraft.on_files.merge_plan import MergePlan, plan_merge
from torchgraft.on_files.merge_record import ADAPTERS, BASE, CHECKSUM, CORRECTIONS, FORMAT, HEADERS, adapters_in, checksum
from torchgraft.rewriting.digests import digesting
from torchgraft.version import __version__

if TYPE_CHECKING:
    from torchgraft.on_files.merge_run import MergeRun


@dataclass(frozen=True)
class MergeReport:
    output: Path
    merged_tensors: int
    copied_tensors: int
    converted_tensors: int
    """Those that only take another dtype."""
    total_bytes: int
    """Of the weight files."""
    files: tuple[str, ...]
    """The weight files."""
    verified: bool
    notes: tuple[str, ...] = ()
    """Decisions that the user may not expect."""
    left_out: tuple[str, ...] = ()
    """Files of the base that were not copied because they contain the same weights in another form, without the merge."""
    undo_bytes: int = 0
    """Size of the undo record; in a dry run, an estimate."""
    changed: Mapping[str, float] = field(default_factory=dict)
    """Merged tensor → share of its entries that the merge changed; empty in a dry run."""
    memory: int = 0
    """Estimate of the peak memory in bytes, without torch itself."""


def merge_checkpoint(
    model: str | Path,
    adapter: str | Path | Mapping[str | Path, float],
    output: str | Path,
    *,
    dtype: str = "",
    onto: Onto | None = None,
    max_shard_size: int = 0,
    verify: bool = True,
    undo: bool = True,
    dry_run: bool = False,
    allow_unchanged: bool = False,
    leave_out: Collection[str] = (),
    kinds: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> MergeReport:
    """Write `model` with adapters merged into it to the new directory `output`.

    Merges are computed in float64 and rounded once, to the dtype that is written.

    While it runs, torch computes with one thread and Python's thread switch interval is 0.1 ms, in the whole process; both are
    restored. glibc's mmap threshold stays at its maximum afterwards.

    Args:
        adapter: its directory; or several, each with its factor f: W + Σ f·ΔW.
        dtype: dtype of the floating weights in the output, except those of quantized layers; empty: unchanged.
        onto: "quantized" merges into the weights as they were quantized during training, which is the default if the adapter
            records it; "original" merges into the base's own.
        max_shard_size: bytes of a weight file. 0: the base's own files.
        verify: read the written tensors back and compare them with a float64 reference.
        undo: write the undo record that `unmerge_checkpoint` needs.
        dry_run: plan the merge, and write nothing. No values are read.
        allow_unchanged: merge adapters that leave a weight as it is, because their change is zero or lost in rounding.
        leave_out: names of files with other trained weights beside the adapters, which are not merged.
        kinds: pattern → kind, for layers whose kind cannot be inferred from the files.
        progress: called with the number of bytes that were just written, and of all that will be.

    Raises:
        FileFormatError, PairingError: a file is broken, or an adapter does not fit.
        MergeError: an adapter is merged already, a weight is shared, adapters cannot be combined, a result is not finite, or a merge
            changes nothing. Nothing is written.
        ConfigError: an option is invalid.
    """
    target = Path(output)
    refuse_existing(target)
    adapters = adapter if isinstance(adapter, Mapping) else {adapter: 1.0}
    checkpoint = open_checkpoint(model)
    for source in (checkpoint.root, *map(Path, adapters)):
        refuse_inside(target, source)
    # One core computes the hashes of the base while the other imports torch.
    background: AbstractContextManager[dict[str, str]] = nullcontext({}) if dry_run else digesting(checkpoint)
    with background as digests:
        plan = plan_merge(checkpoint, adapters, dtype=dtype, onto=onto, max_shard_size=max_shard_size, leave_out=leave_out, kinds=kinds)
        if plan.sidecars.left_out:
            warnings.warn(
                f"not copied (other copies of the weights, which the merge would leave stale): {', '.join(plan.sidecars.left_out)}",
                TorchgraftWarning,
                stacklevel=2,
            )
        needed = _needed_bytes(plan, undo)
        if dry_run:
            report = _report(plan, target, False, _undo_bytes(plan) if undo else 0)
            problem = space_problem(target, needed)
            return replace(report, notes=(*report.notes, *([f"it would be refused: {problem}"] if problem else [])))
        check_space(target, needed)
        from torchgraft.on_files.merge_run import MergeRun
    return _carry_out(MergeRun(plan, digests), target, str(model), verify, undo, allow_unchanged, progress)


def _carry_out(run: MergeRun, target: Path, model: str, verify: bool, undo: bool, allow_unchanged: bool, progress: Progress) -> MergeReport:
    from torchgraft.on_files.merge_verify import CHECKED, verify_merge

    plan = run.plan
    with new_directory(target) as directory:
        digests = run.write(directory, directory / UNDO / CORRECTIONS if undo else None, progress)
        unchanged = _unchanged(run)
        if unchanged and not allow_unchanged:
            raise MergeError(f"{unchanged} Nothing was written; --allow-unchanged merges it nevertheless")
        for name, source in plan.sidecars.files.items():
            if name not in plan.rewritten:
                copy_into(source, directory / name)
        for name, content in plan.rewritten.items():
            if content:
                (directory / name).write_bytes(content)
        if verify:
            verify_merge(run, directory)
        if undo:
            _write_undo(plan, directory)
        record = _record(plan, model, digests, CHECKED if verify else "", undo) | {"changed": run.changed}
        record = json.loads(json_bytes(record))  # as it will be read: a path that is no valid Unicode is not kept as it is
        (directory / RECORD).write_bytes(json_bytes(record | {CHECKSUM: checksum(record)}))
        report = _report(plan, target, verify, _size(directory / UNDO))
        entries = {placed.name: prod(placed.shape) for placed in plan.layout.tensors}
        shares = {name: count / max(1, entries[name]) for name, count in sorted(run.changed.items())}
        return replace(report, changed=shares, notes=(*report.notes, *([unchanged] if unchanged else [])))


def _unchanged(run: MergeRun) -> str:
    """Describe the tensors that the merge left as they were; empty if there are none."""
    names = run.unchanged()
    if not names:
        return ""
    return (
        f"{len(names)} of {len(run.changed)} merged tensors are the base's, unchanged ({', '.join(names[:3])}{'…' if names[3:] else ''}): "
        "the adapter's change is zero, or too small for the dtype. Was it trained, and saved whole?"
    )


def _write_undo(plan: MergePlan, directory: Path) -> None:
    """All but the corrections, which are written with the weights."""
    checkpoint, undo = plan.checkpoint, directory / UNDO
    for number, one in enumerate(plan.ingredients):
        files = one.pairing.files
        for name in (files.tensor_file.name, NATIVE, PEFT_CONFIG):
            if (files.directory / name).is_file():
                copy_into(files.directory / name, undo / ADAPTERS / str(number) / name)
    for header in checkpoint.headers:
        path = undo / HEADERS / f"{relative_name(checkpoint, header)}.header"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header.raw)
    for name, source in plan.sidecars.base.items():
        if name in plan.rewritten or plan.sidecars.files.get(name) != source:
            copy_into(source, undo / BASE / name)


def _record(plan: MergePlan, model: str, digests: Mapping[str, str], verified: str, undo: bool) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "torchgraft": __version__,
        "base": model,
        "adapters": [
            {
                "path": str(one.path),
                "method": one.pairing.method.name,
                "factor": one.factor,
                "names": one.pairing.tensor_names,
                "sha256": sha256_of_file(one.pairing.files.tensor_file),
            }
            for one in plan.ingredients
        ],
        "sites": {
            name.removesuffix(".weight"): {"kind": change.kind.name, "quantization": dict(change.quantization)}
            for name, change in plan.changes.items()
            if change.kind is not None
        },
        "earlier": adapters_in(plan.checkpoint),
        "merged_tensors": sorted(plan.changes),
        "notes": list(plan.notes),
        "undo": undo,
        "headers": {relative_name(plan.checkpoint, header): sha256_of_bytes(header.raw) for header in plan.checkpoint.headers},
        "original_tensors": dict(digests),
        "original_files": {name: sha256_of_file(path) for name, path in plan.sidecars.base.items()},
        "verified": verified,
    }


def _report(plan: MergePlan, target: Path, verified: bool, undo_bytes: int) -> MergeReport:
    tensors = list(plan.layout.tensors)
    copied = sum(map(plan.is_copied, tensors))
    return MergeReport(
        output=target,
        merged_tensors=len(plan.changes),
        copied_tensors=copied,
        converted_tensors=len(tensors) - copied - len(plan.changes),
        total_bytes=plan.layout.nbytes,
        files=tuple(file.name for file in plan.layout.files),
        verified=verified,
        notes=tuple(plan.notes),
        left_out=plan.sidecars.left_out,
        undo_bytes=undo_bytes,
        memory=plan.memory,
    )


def _needed_bytes(plan: MergePlan, undo: bool) -> int:
    beside = sum(path.stat().st_size for path in plan.sidecars.files.values())
    return plan.layout.nbytes + beside + (_undo_bytes(plan) if undo else 0)


def _undo_bytes(plan: MergePlan) -> int:
    earlier = plan.checkpoint.directory / UNDO
    adapters = sum(one.pairing.files.tensor_file.stat().st_size for one in plan.ingredients)
    return plan.correction_bytes + adapters + _size(earlier)


def _size(directory: Path) -> int:
    return sum((Path(root) / name).stat().st_size for root, _, names in os.walk(directory) for name in names)
