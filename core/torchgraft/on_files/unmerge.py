"""Taking a merge back: from the merged directory alone, or from the base, to every file of the base, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchgraft.adapter_files.reading import read_adapter
from torchgraft.arithmetic import exact
from torchgraft.arithmetic.layer_merge import Applied
from torchgraft.arithmetic.tensor_merge import TensorMerge
from torchgraft.checkpoint.header import read_header
from torchgraft.checkpoint.layout import Layout, OutputFile, Placed, plan_layout, same_file
from torchgraft.checkpoint.reading import Checkpoint, open_checkpoint
from torchgraft.checkpoint.sidecars import RECORD, UNDO
from torchgraft.disk import Progress, check_space, copy_into, new_directory, refuse_existing, refuse_inside, silent
from torchgraft.dtypes import ADAPTABLE
from torchgraft.errors import FileFormatError, MergeError, TorchgraftWarning
from torchgraft.hashes import sha256_of_bytes, sha256_of_file
from torchgraft.kinds.kind import Kind
from torchgraft.on_files.corrections_file import UndoReader
from torchgraft.on_files.merge_record import ADAPTERS, BASE, CORRECTIONS, HEADERS, inside, read_record
from torchgraft.pairing.base import base_of_checkpoint
from torchgraft.pairing.matching import pair_as
from torchgraft.pairing.pairing import PairedSite, Pairing
from torchgraft.pairing.tensors import AdapterTensors
from torchgraft.plugin.method_hooks import MethodHooks
from torchgraft.plugin.registry import registry
from torchgraft.rewriting.digests import digest_range
from torchgraft.rewriting.file_tensors import FileTensor, blocks_of, copy_bytes
from torchgraft.rewriting.workers import Workers, opened, start_files


@dataclass(frozen=True)
class UnmergeReport:
    output: Path
    restored_tensors: int
    copied_tensors: int
    files: int
    """How many files were compared with the hashes of the originals."""
    from_base: bool
    """Whether they come from a base that was given, and not from the merged directory."""


def unmerge_checkpoint(
    merged: str | Path, output: str | Path, *, base: str | Path | None = None, progress: Progress = silent
) -> UnmergeReport:
    """Write the base of `merged` to the new directory `output`: every tensor and file has the hash of the original, or it is refused.

    While it runs, torch computes with one thread and Python's thread switch interval is 0.1 ms, in the whole process; both are
    restored. glibc's mmap threshold stays at its maximum afterwards.

    Args:
        base: take the originals from here; for what was merged without an undo record, or where arithmetic differs.

    Raises:
        MergeError: the directory was not merged here or without an undo record, or was changed since.
        FileFormatError: a file is broken.
    """
    target = Path(output)
    refuse_existing(target)
    checkpoint = open_checkpoint(merged)
    refuse_inside(target, checkpoint.root)
    record = read_record(checkpoint)
    if not record:
        raise MergeError(f"{checkpoint.root}: no {RECORD} in it, so it was not merged by torchgraft; there is nothing to take back")
    if base is None and not record["undo"]:
        raise MergeError(f"{checkpoint.root}: it was merged with --no-undo, so the original bits are not in it; give the base: --base DIR")
    origin = _Base(open_checkpoint(base)) if base is not None else _Merged(checkpoint, record)
    _check_headers(origin, record["headers"])
    check_space(target, origin.layout.nbytes)
    originals = record["original_tensors"]
    names = {placed.name for placed in origin.layout.tensors}
    if names != originals.keys():
        odd = sorted(names.symmetric_difference(originals))
        raise MergeError(f"{origin.checkpoint.root}: it has not the tensors of the original ({odd[0]}), so it cannot give it back")

    def work(job: tuple[OutputFile, Placed]) -> tuple[Placed, str]:
        file, placed = job
        with opened(origin.checkpoint, directory, file, placed) as (source, written):
            return placed, origin.write(source, written, placed, workers)

    with new_directory(target) as directory:
        workers = Workers(origin.layout.nbytes, progress)
        start_files(origin.layout, directory)
        with closing(workers.map(work, [(file, placed) for file in origin.layout.files for placed in file.tensors])) as results:
            for placed, digest in results:
                if digest != originals[placed.name]:
                    raise origin.refused(placed.name)
        _write_files(origin, record, directory)
    restored = sum(map(origin.is_restored, names))
    return UnmergeReport(
        target, restored, len(names) - restored, len(origin.layout.files) + len(record["original_files"]), from_base=base is not None
    )


def _check_headers(origin: _Base | _Merged, expected: Mapping[str, Any]) -> None:
    found = {file.name: sha256_of_bytes(file.header) for file in origin.layout.files}
    if found != expected:
        raise MergeError(
            f"{origin.checkpoint.root}: the headers of the original's weight files are missing or other ones, so it cannot be given back"
        )


def _write_files(origin: _Base | _Merged, record: Mapping[str, Any], directory: Path) -> None:
    """Those beside the weights, the record of an earlier merge included."""
    for name, digest in record["original_files"].items():
        source, target = origin.file(name), inside(directory, name)
        if not source.is_file():
            raise MergeError(f"{origin.checkpoint.root}: {name} is missing, so the original cannot be given back whole")
        copy_into(source, target)
        if sha256_of_file(target) != digest:
            raise MergeError(f"{source}: it is not the original's any more, so that cannot be given back. Nothing was left behind")


class _Base:
    """The originals from the base itself."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.layout = checkpoint, plan_layout(checkpoint)

    def is_restored(self, name: str) -> bool:
        return False

    def write(self, source: FileTensor, target: FileTensor, placed: Placed, workers: Workers) -> str:
        return _copied(source, target, workers)

    def refused(self, name: str) -> MergeError:
        return MergeError(f"{self.checkpoint.root}: {name} is not what was merged into: this is another base, or it was changed since")

    def file(self, name: str) -> Path:
        return inside(self.checkpoint.directory, name)


class _Merged:
    """The originals from the merged directory and its undo record."""

    def __init__(self, checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
        self.checkpoint, self._root = checkpoint, checkpoint.directory / UNDO
        self._undo = UndoReader(self._root / CORRECTIONS)
        self._pairings = _pairings(checkpoint, record)
        for pairing in self._pairings:
            if pairing.other_plugin:
                warnings.warn(pairing.other_plugin, TorchgraftWarning, stacklevel=3)
        self._tensors = [AdapterTensors(pairing) for pairing in self._pairings]
        self._sites: dict[str, list[tuple[int, PairedSite]]] = {}
        for number, pairing in enumerate(self._pairings):
            for paired in pairing.sites:
                self._sites.setdefault(f"{paired.site.name}.weight", []).append((number, paired))
        self._record = record
        self.layout = Layout(tuple(self._files()), {}, is_new=False)

    def is_restored(self, name: str) -> bool:
        return name in self._undo.names

    def write(self, source: FileTensor, target: FileTensor, placed: Placed, workers: Workers) -> str:
        if not self.is_restored(placed.name):
            return _copied(source, target, workers)
        sites = self._sites.get(placed.name, [])
        undo = self._undo.read(placed.name, len(sites))
        for (number, _), needed in zip(sites, undo.needed, strict=True):
            hooks = self._hooks(number)
            if not needed and hooks.has("adapter_undo") and not hooks.method.additive:
                raise self._does_not_fit(placed.name)
        merge = TensorMerge(
            placed.name, placed.shape, target.dtype, source.dtype, self._kind(placed.name), self._applied(sites), needed=undo.needed
        )
        blocks = blocks_of(source, target, merge.kind, by_rows=merge.by_rows)
        for rows, correction in undo.blocks:
            try:
                restored = exact.correct(merge.nearly(blocks.read(rows), rows), correction)
            except ValueError:
                raise self._does_not_fit(placed.name) from None
            blocks.write(rows, restored)
            workers.advance(restored.nbytes)
        return _digest(target, workers)

    def _does_not_fit(self, name: str) -> FileFormatError:
        return FileFormatError(f"{self._root / CORRECTIONS}: it does not fit {name!r}; copy the merged directory again")

    def _hooks(self, number: int) -> MethodHooks:
        return registry().hooks(self._pairings[number].method.name)

    def refused(self, name: str) -> MergeError:
        if self.is_restored(name):
            return exact.not_restored(name)
        return MergeError(
            f"{self.checkpoint.root}: {name} was changed since the merge, so the original cannot be given back. Nothing was left behind"
        )

    def file(self, name: str) -> Path:
        kept = inside(self._root / BASE, name)
        return kept if kept.is_file() else inside(self.checkpoint.directory, name)

    def _kind(self, name: str) -> Kind | None:
        site = self._record["sites"].get(name.removesuffix(".weight"))
        return registry().kind(site["kind"]) if site and name.endswith(".weight") else None

    def _applied(self, sites: list[tuple[int, PairedSite]]) -> list[Applied]:
        return [
            Applied(
                self._hooks(number),
                paired.config,
                self._tensors[number].params(paired),
                float(self._record["adapters"][number]["factor"]),
            )
            for number, paired in sites
        ]

    def _files(self) -> list[OutputFile]:
        """The base's weight files, by their headers."""
        root = self._root / HEADERS
        files = []
        for path in sorted(root.rglob("*.header")):
            header = read_header(path, alone=True)
            for entry in header.in_file_order:
                found = self.checkpoint.tensors.get(entry.name)
                if found is None or found.shape != entry.shape:
                    raise MergeError(
                        f"{self.checkpoint.root}: {entry.name} is missing or has another shape, so the original cannot be given back"
                    )
            files.append(same_file(path.relative_to(root).as_posix().removesuffix(".header"), header))
        return files


def _pairings(checkpoint: Checkpoint, record: Mapping[str, Any]) -> list[Pairing]:
    base = base_of_checkpoint(checkpoint)
    # What the merge took each layer for, --kind included.
    kinds = {
        name: replace(layer, kind=site["kind"])
        for name, site in record["sites"].items()
        if (layer := base.layers.get(name)) and layer.has_weight and layer.dtype in ADAPTABLE
    }
    base = replace(base, layers={**base.layers, **kinds})
    root = checkpoint.directory / UNDO / ADAPTERS
    return [pair_as(read_adapter(root / str(number)), base, entry["names"]).demand(base) for number, entry in enumerate(record["adapters"])]


def _copied(source: FileTensor, target: FileTensor, workers: Workers) -> str:
    for nbytes in copy_bytes(source, target):
        workers.advance(nbytes)
    return _digest(target, workers)


def _digest(file: FileTensor, workers: Workers) -> str:
    """Of what was written, not of what should have been."""
    return digest_range(file.descriptor, file.begin, file.begin + file.nbytes, file.where, workers.stopped)
