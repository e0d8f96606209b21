"""Execute the plan of a merge: each tensor of the output is copied by the kernel, or computed a few rows at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path

from torch import Tensor

from torchgraft import dtypes
from torchgraft.arithmetic.bias_merge import BiasMerge
from torchgraft.arithmetic.exact import changed_entries, make_correction
from torchgraft.arithmetic.layer_merge import Applied, check_no_bias
from torchgraft.arithmetic.tensor_merge import TensorMerge
from torchgraft.checkpoint.layout import OutputFile, Placed
from torchgraft.disk import Progress
from torchgraft.hashes import as_bytes
from torchgraft.on_files.corrections_file import Corrections, UndoWriter
from torchgraft.on_files.merge_changes import Change
from torchgraft.on_files.merge_plan import MergePlan
from torchgraft.pairing.pairing import PairedSite
from torchgraft.pairing.tensors import AdapterTensors
from torchgraft.rewriting.file_tensors import FileBlocks, FileTensor, blocks_of, copy_bytes
from torchgraft.rewriting.workers import Workers, opened, start_files


class MergeRun:
    """Executes the plan of a merge.

    Args:
        digests: hashes of the base's tensors that are known already; the others are computed on the way.

    Raises:
        PairingError: an adapter has NaN or infinite entries.
        MergeError: an adapter changes a bias where there is none.
    """

    def __init__(self, plan: MergePlan, digests: Mapping[str, str]) -> None:
        self.plan, self._digests = plan, digests
        self.changed: dict[str, int] = {}
        """Merged tensor → number of its entries that the merge changed, after `write`."""
        self._tensors = [AdapterTensors(one.pairing) for one in plan.ingredients]
        for number, one in enumerate(plan.ingredients):
            for paired in one.pairing.sites if one.hooks.merges_bias else ():
                if not paired.site.has_bias:
                    check_no_bias(paired.site.name, self._applied(number, paired), paired.site.out_features)

    def write(self, directory: Path, corrections: Path | None, progress: Progress) -> dict[str, str]:
        """Write every weight file to `directory` and the corrections to `corrections`; return the hashes of the base's tensors."""
        start_files(self.plan.layout, directory)
        workers = Workers(self.plan.layout.nbytes, progress)
        with nullcontext() if corrections is None else UndoWriter(corrections) as undo:

            def work(job: tuple[OutputFile, Placed]) -> tuple[str, str]:
                return job[1].source, self._write(directory, *job, workers, undo)

            with closing(workers.map(work, jobs(self.plan))) as results:
                digests = dict(results)
            if undo is not None:
                undo.finish()
        return digests

    def unchanged(self) -> list[str]:
        """Return the tensors that adapters should have changed and of which no entry changed, after `write`.

        Where every adapter has rank 0, nothing should change. A module that is saved whole may be the base's own.
        """
        return sorted(name for name, count in self.changed.items() if not count and self._should_change(self.plan.changes[name]))

    def _should_change(self, change: Change) -> bool:
        params = [self._tensors[number].params(paired).values() for number, paired in change.sites]
        return any(all(tensor.numel() for tensor in tensors) for tensors in params)

    def tensor_merge(self, placed: Placed, source: FileTensor) -> TensorMerge | BiasMerge:
        """Return the computation of one tensor that is not merely copied."""
        change, written = self.plan.changes.get(placed.name, Change()), dtypes.torch_dtype(placed.dtype)
        applied = [self._applied(number, paired) for number, paired in change.sites]
        if change.is_bias:
            return BiasMerge(placed.name, source.dtype, written, applied)
        trained = None if change.replaced is None else self._tensors[change.replaced[0]].by_name[change.replaced[1]]
        start = _start(change.quantization, source)
        return TensorMerge(placed.name, placed.shape, source.dtype, written, change.kind, applied, trained=trained, start=start)

    def _applied(self, number: int, paired: PairedSite) -> Applied:
        one = self.plan.ingredients[number]
        return Applied(one.hooks, paired.config, self._tensors[number].params(paired), one.factor)

    def _write(self, directory: Path, file: OutputFile, placed: Placed, workers: Workers, undo: UndoWriter | None) -> str:
        """Write one tensor, and return the hash of the base's tensor."""
        with opened(self.plan.checkpoint, directory, file, placed) as (source, target):
            digest = self._digests.get(placed.source, "")
            if self.plan.is_copied(placed):
                for nbytes in copy_bytes(source, target):
                    workers.advance(nbytes)
            else:
                digest = self._rewrite(source, target, placed, digest, workers, undo if placed.name == placed.source else None)
            begin, end = source.begin, source.begin + source.nbytes
            return digest or workers.digest(source.descriptor, begin, end, source.where)

    def _rewrite(
        self, source: FileTensor, target: FileTensor, placed: Placed, digest: str, workers: Workers, undo: UndoWriter | None
    ) -> str:
        """Compute one tensor block by block; return the hash of the base's tensor if it is known by then."""
        merge = self.tensor_merge(placed, source)
        blocks = blocks_of(source, target, merge.kind, by_rows=merge.by_rows)
        sha = hashlib.sha256() if isinstance(blocks, FileBlocks) and not digest else None
        corrections, undo_tensors, changed = Corrections(), merge.undo_tensors(), 0
        for rows in blocks.rows:
            original = blocks.read(rows)
            if sha is not None:  # the rows are in memory, in the order of the file
                sha.update(as_bytes(original))
            merged = merge.merged(original, rows)
            undo_tensors.add(rows, merged.needed)
            changed += changed_entries(original, merged.weight)
            blocks.write(rows, merged.weight)
            if undo is not None:
                nearly = merge.nearly(merged.weight, rows, undo_tensors.tensors, merged.change)
                corrections.append(rows, make_correction(original, nearly))
            workers.advance(merged.weight.nbytes)
        if placed.name in self.plan.changes:
            self.changed[placed.name] = changed
        if undo is not None and corrections.blocks:
            undo.add(placed.name, corrections, undo_tensors.tensors)
        return digest if sha is None else sha.hexdigest()


def jobs(plan: MergePlan) -> list[tuple[OutputFile, Placed]]:
    """Return every tensor of the output with its file."""
    return [(file, placed) for file in plan.layout.files for placed in file.tensors]


def _start(quantization: Mapping[str, object], source: FileTensor) -> Tensor | None:
    if not quantization:
        return None
    from torchgraft.kinds.quantized import round_trip  # bitsandbytes takes seconds

    return round_trip(source.mapped(written=False), quantization)
