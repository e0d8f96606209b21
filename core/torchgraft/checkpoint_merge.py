"""Merging an adapter into a checkpoint: files in, files out, one tensor in memory at a time, no model.

The output keeps the files, names and headers of the base; only the bytes of the merged tensors differ. Beside them lie
`torchgraft_merge.json`, which says what was merged, and `torchgraft_undo/`, which holds what unmerge needs.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

import torchgraft
from torchgraft import exact
from torchgraft.adapter_files import NATIVE, PEFT_CONFIG, AdapterFiles, read_adapter
from torchgraft.adapter_load import read_tensors, site_tensors
from torchgraft.checkpoint import Checkpoint, open_checkpoint, read_json, read_tensor
from torchgraft.errors import FileFormatError, MergeError, TorchgraftWarning
from torchgraft.manager import MethodHooks, registry
from torchgraft.output import json_bytes, new_directory, refuse_existing
from torchgraft.pairing import Base, PairedSite, Pairing, base_of_checkpoint, pair
from torchgraft.safetensors_header import Header, TensorEntry
from torchgraft.sidecars import RECORD, UNDO, copy_into, sha256, sidecars
from torchgraft.site import to_canonical
from torchgraft.weights import merged_weight, nearly_unmerged

CORRECTIONS = "corrections.safetensors"
CHUNK = 1 << 23
SAMPLED_ROWS = 64
FORMAT = 1

Progress = Callable[[int], None]
"""Called with the number of bytes that were just written."""


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


@dataclass
class Merge:
    """What one merge knows: tensor → the site that changes it, or the adapter's tensor that replaces it."""

    checkpoint: Checkpoint
    pairing: Pairing
    hooks: MethodHooks
    sites: dict[str, PairedSite]
    replaced: dict[str, str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The adapter's, by their names in its file."""

    def params(self, paired: PairedSite) -> dict[str, Tensor]:
        return site_tensors(self.pairing, paired, self.tensors)

    def merged(self, name: str, original: Tensor) -> Tensor:
        """The tensor `name` with the adapter in it."""
        if name in self.replaced:
            return self.tensors[self.replaced[name]].to(original.dtype)
        paired = self.sites[name]
        return merged_weight(self.hooks, paired.site.name, paired.site.kind, paired.config, self.params(paired), original)

    def nearly_unmerged(self, name: str, merged: Tensor) -> Tensor:
        paired = self.sites[name]
        return nearly_unmerged(self.hooks, paired.site.kind, paired.config, self.params(paired), merged)

    @property
    def changed(self) -> set[str]:
        return {*self.sites, *self.replaced}


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
            _verify(merge, directory)
        (directory / RECORD).write_bytes(json_bytes(_record(merge, str(model), carried, corrections, verify, undo)))
        undo_bytes = sum(path.stat().st_size for path in (directory / UNDO).rglob("*") if path.is_file())
    return MergeReport(**{**report.__dict__, "undo_bytes": undo_bytes})


def prepare(checkpoint: Checkpoint, files: AdapterFiles, kinds: dict[str, str] | None) -> Merge:
    """Pair adapter and checkpoint, and refuse what must not be merged."""
    base = base_of_checkpoint(checkpoint, kinds)
    _refuse_merged(checkpoint, files)
    return prepare_on(checkpoint, pair(files, base).demand(base), base)


def prepare_on(checkpoint: Checkpoint, pairing: Pairing, base: Base) -> Merge:
    sites = {f"{paired.site.name}.weight": paired for paired in pairing.sites}
    for name in (*pairing.trained, *sites):
        layer = base.layers.get(name.rpartition(".")[0])
        if layer is not None and layer.tied and name.endswith(".weight"):
            raise MergeError(
                f"{layer.name}: its weight is also that of {', '.join(layer.tied)} (config.json ties them), so merging would change both. "
                "Untie them first: save the model with tie_word_embeddings=False and a head of its own"
            )
    return Merge(checkpoint, pairing, registry().hooks(pairing.method.name), sites, pairing.trained)


def copy_bytes(source: BinaryIO, target: BinaryIO, entry: TensorEntry, progress: Progress) -> None:
    """One tensor's bytes from file to file."""
    source.seek(entry.begin)
    left = entry.end - entry.begin
    while left:
        chunk = source.read(min(CHUNK, left))
        if not chunk:
            raise FileFormatError(f"{source.name}: it became shorter while it was read, at tensor {entry.name!r}")
        target.write(chunk)
        left -= len(chunk)
        progress(len(chunk))


def relative_name(checkpoint: Checkpoint, header: Header) -> Path:
    return header.path.relative_to(checkpoint.directory)


def _refuse_merged(checkpoint: Checkpoint, files: AdapterFiles) -> None:
    record = read_json(checkpoint.directory / RECORD, missing_ok=True)
    if sha256(files.tensor_file) in [*record.get("earlier", []), record.get("adapter", {}).get("sha256")]:
        raise MergeError(f"{checkpoint.root}: this adapter is merged into it already ({RECORD}); use the base model")


def _check_space(target: Path, needed: int) -> None:
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise FileFormatError(
            f"{target}: the disk has {free:,} bytes free, and the result takes {needed:,}; free some, or choose another output"
        )


def _write_weights(merge: Merge, directory: Path, undo: bool, progress: Progress) -> dict[str, exact.Correction]:
    corrections: dict[str, exact.Correction] = {}
    for header in merge.checkpoint.headers:
        path = directory / relative_name(merge.checkpoint, header)
        path.parent.mkdir(parents=True, exist_ok=True)
        with header.path.open("rb") as source, path.open("wb") as target:
            target.write(header.raw)
            for entry in header.in_file_order:
                if entry.name not in merge.changed:
                    copy_bytes(source, target, entry, progress)
                    continue
                original = read_tensor(source, entry)
                merged = merge.merged(entry.name, original)
                if undo:
                    corrections[entry.name] = _correction(merge, entry.name, original, merged)
                target.write(exact.as_bytes(merged))
                progress(entry.end - entry.begin)
    return corrections


def _correction(merge: Merge, name: str, original: Tensor, merged: Tensor) -> exact.Correction:
    if name in merge.replaced:  # nothing of the original is in the result: all of it is kept
        return exact.Correction(torch.arange(original.numel()), original.flatten(), exact.digest(original))
    return exact.make_correction(original, merge.nearly_unmerged(name, merged))


def _write_undo(merge: Merge, directory: Path, corrections: dict[str, exact.Correction]) -> None:
    undo = directory / UNDO
    files = merge.pairing.files
    for name in (files.tensor_file.name, NATIVE, PEFT_CONFIG):
        if (files.directory / name).is_file():
            copy_into(files.directory / name, undo / "adapter" / name)
    sparse = {name: correction for name, correction in corrections.items() if name in merge.sites}
    tensors = {f"{name}#index": correction.index for name, correction in sparse.items()}
    tensors |= {f"{name}#value": correction.value for name, correction in corrections.items()}
    save_file(tensors, undo / CORRECTIONS, metadata={"format": "pt"})
    for relative in (RECORD, UNDO):  # of an earlier merge, which unmerging this one gives back
        earlier = merge.checkpoint.directory / relative
        if earlier.is_dir():
            shutil.copytree(earlier, undo / "base" / relative)
        elif earlier.is_file():
            copy_into(earlier, undo / "base" / relative)


def _record(
    merge: Merge, model: str, carried: list[Path], corrections: dict[str, exact.Correction], verified: bool, undo: bool
) -> dict[str, Any]:
    checkpoint, files = merge.checkpoint, merge.pairing.files
    weights = {relative_name(checkpoint, header).as_posix(): header.path for header in checkpoint.headers}
    everything = weights | {path.as_posix(): checkpoint.root / path for path in carried}
    return {
        "format": FORMAT,
        "torchgraft": torchgraft.__version__,
        "base": model,
        "adapter": {"path": str(files.directory), "method": merge.pairing.method.name, "sha256": sha256(files.tensor_file)},
        "sites": {paired.site.name: {"kind": paired.site.kind.name, "groups": paired.site.groups} for paired in merge.sites.values()},
        "earlier": _earlier(checkpoint),
        "merged_tensors": sorted(merge.changed),
        "undo": undo,
        "original_tensors": {name: correction.digest for name, correction in corrections.items()},
        "original_files": {name: sha256(path) for name, path in everything.items()} if undo else {},
        "verified": f"up to {SAMPLED_ROWS} rows of each merged tensor against a float64 reference" if verified else "",
    }


def _earlier(checkpoint: Checkpoint) -> list[str]:
    record = read_json(checkpoint.directory / RECORD, missing_ok=True)
    return [*record.get("earlier", []), record["adapter"]["sha256"]] if record else []


def _verify(merge: Merge, directory: Path) -> None:
    """Read back what was written and compare it with the same formula in float64."""
    for header in merge.checkpoint.headers:
        with (directory / relative_name(merge.checkpoint, header)).open("rb") as written, header.path.open("rb") as source:
            for entry in header.in_file_order:
                if entry.name in merge.changed:
                    _verify_tensor(merge, entry.name, read_tensor(source, entry), read_tensor(written, entry))


def _verify_tensor(merge: Merge, name: str, original: Tensor, written: Tensor) -> None:
    if name in merge.replaced:
        right = written.equal(merge.tensors[merge.replaced[name]].to(original.dtype))
    else:
        right = _rows_agree(merge, merge.sites[name], original, written)
    if not right:
        raise MergeError(
            f"{name}: what was written differs from the float64 reference; the disk or the arithmetic is at fault. Nothing was left behind"
        )


def _rows_agree(merge: Merge, paired: PairedSite, original: Tensor, written: Tensor) -> bool:
    kind, hooks = paired.site.kind, merge.hooks
    params = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in merge.params(paired).items()}
    weight, found = to_canonical(kind, original).double(), to_canonical(kind, written).double()
    stride = max(1, len(weight) // SAMPLED_ROWS) if hooks.merges_rows else 1
    for first in range(0, len(weight), stride) if hooks.merges_rows else [0]:
        rows = slice(first, first + 1) if hooks.merges_rows else slice(None)
        expected = hooks.merge(paired.config, params, weight[rows], rows)
        rounding = torch.finfo(original.dtype).eps * expected.abs()
        smallest = torch.finfo(original.dtype).smallest_normal * torch.finfo(original.dtype).eps
        arithmetic = smallest + 16 * torch.finfo(torch.float32).eps * (expected.abs().amax() + weight[rows].abs().amax())
        if not ((found[rows] - expected).abs() <= rounding + arithmetic).all():
            return False
    return True
