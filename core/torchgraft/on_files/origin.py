"""Where the bits of the base come from when a merge is undone: the base itself, or the merged directory and its undo record."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torchgraft.adapter_files.reading import read_adapter
from torchgraft.arithmetic import exact
from torchgraft.arithmetic.layer_merge import Applied
from torchgraft.arithmetic.tensor_merge import TensorMerge
from torchgraft.checkpoint.header import read_header
from torchgraft.checkpoint.layout import Layout, OutputFile, Placed, plan_layout, same_file
from torchgraft.checkpoint.reading import INDEX, Checkpoint, obey, read_index
from torchgraft.checkpoint.sidecars import UNDO
from torchgraft.dtypes import ADAPTABLE
from torchgraft.errors import FileFormatError, MergeError, TorchgraftWarning
from torchgraft.kinds.kind import Kind
from torchgraft.on_files.corrections_file import UndoReader
from torchgraft.on_files.merge_record import ADAPTERS, BASE, CORRECTIONS, HEADERS, MergeRecord, inside
from torchgraft.pairing.base import base_of_checkpoint
from torchgraft.pairing.matching import pair_as
from torchgraft.pairing.pairing import PairedSite, Pairing
from torchgraft.pairing.tensors import AdapterTensors
from torchgraft.plugin.method_hooks import MethodHooks
from torchgraft.plugin.registry import registry
from torchgraft.rewriting.file_tensors import FileTensor, blocks_of, copy_bytes
from torchgraft.rewriting.workers import Workers

TALLER = 4
"""How many times as tall as here the blocks of another version may be."""


FOREIGN = (ValueError, RuntimeError, TypeError, LookupError)
"""What hooks raise for tensors of an undo record that they did not write."""


class Origin(Protocol):
    """A source of the base's tensors and files."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that tensors are read from."""

    @property
    def layout(self) -> Layout:
        """The weight files of the base."""

    def is_restored(self, name: str) -> bool:
        """Whether the tensor is computed from the merged one, and not copied."""

    def write(self, source: FileTensor, target: FileTensor, placed: Placed, workers: Workers) -> None:
        """Write one tensor of the base."""

    def refused(self, name: str) -> MergeError:
        """Return the error for a tensor whose hash is not that of the base."""

    def file(self, name: str) -> Path:
        """Return the path of a file beside the weights."""


class BaseOrigin:
    """The base itself."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.layout = checkpoint, plan_layout(checkpoint)

    def is_restored(self, name: str) -> bool:
        return False

    def write(self, source: FileTensor, target: FileTensor, placed: Placed, workers: Workers) -> None:
        _copy(source, target, workers)

    def refused(self, name: str) -> MergeError:
        return MergeError(
            f"{self.checkpoint.root}: {name} is not the tensor that was merged into: this is another base, or it changed after the merge"
        )

    def file(self, name: str) -> Path:
        return inside(self.checkpoint.directory, name)


class MergedOrigin:
    """The merged directory and its undo record."""

    def __init__(self, checkpoint: Checkpoint, record: MergeRecord) -> None:
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

    def write(self, source: FileTensor, target: FileTensor, placed: Placed, workers: Workers) -> None:
        if not self.is_restored(placed.name):
            _copy(source, target, workers)
            return
        sites = self._sites.get(placed.name, [])
        merge = TensorMerge(placed.name, placed.shape, target.dtype, source.dtype, self._kind(placed.name), self._applied(sites))
        blocks = blocks_of(source, target, merge.kind, by_rows=merge.by_rows)
        rows = blocks.rows[-1].stop if blocks.rows else 0
        tallest = TALLER * max((block.stop - block.start for block in blocks.rows), default=0)
        undo = self._undo.read(placed.name, len(sites), rows, tallest, target.dtype)
        for (number, _), needed in zip(sites, undo.needed, strict=True):
            hooks = self._hooks(number)
            if not needed and hooks.has("adapter_undo") and not hooks.method.additive:
                raise self._does_not_fit(placed.name)
        for block, correction in undo.blocks:
            try:
                restored = exact.correct(merge.nearly(blocks.read(block), block, undo.needed), correction)
            except FOREIGN as error:
                raise self._does_not_fit(placed.name) from error
            blocks.write(block, restored)
            workers.advance(restored.nbytes)

    def _does_not_fit(self, name: str) -> FileFormatError:
        return FileFormatError(f"{self._root / CORRECTIONS}: the corrections do not fit {name!r}; copy the merged directory again")

    def _hooks(self, number: int) -> MethodHooks:
        return registry().hooks(self._pairings[number].method.name)

    def refused(self, name: str) -> MergeError:
        if self.is_restored(name):
            return exact.not_restored(name)
        return MergeError(f"{self.checkpoint.root}: {name} changed after the merge, so the base cannot be restored. Nothing was written")

    def file(self, name: str) -> Path:
        stored = inside(self._root / BASE, name)
        return stored if stored.is_file() else inside(self.checkpoint.directory, name)

    def _kind(self, name: str) -> Kind | None:
        layer = self._record.sites.get(name.removesuffix(".weight"))
        return registry().kind(layer.kind) if layer and name.endswith(".weight") else None

    def _applied(self, sites: list[tuple[int, PairedSite]]) -> list[Applied]:
        return [
            Applied(
                self._hooks(number),
                paired.config,
                self._tensors[number].params(paired),
                self._record.adapters[number].factor,
            )
            for number, paired in sites
        ]

    def _files(self) -> list[OutputFile]:
        """Return the base's weight files, from their stored headers."""
        root, index = self._root / HEADERS, self.checkpoint.index or INDEX
        weight_map = read_index(self.file(index)) if index in self._record.original_files else {}
        files = []
        for path in sorted(root.rglob("*.header")):
            name = path.relative_to(root).as_posix().removesuffix(".header")
            header = obey(weight_map, name, read_header(path, alone=True))
            for entry in header.in_file_order:
                found = self.checkpoint.tensors.get(entry.name)
                is_copied = found is not None and not self.is_restored(entry.name)
                if found is None or found.shape != entry.shape or (is_copied and found.dtype != entry.dtype):
                    raise MergeError(
                        f"{self.checkpoint.root}: {entry.name} is missing or has another shape, so the base cannot be restored"
                    )
            files.append(same_file(name, header))
        return files


def _pairings(checkpoint: Checkpoint, record: MergeRecord) -> list[Pairing]:
    """Pair the stored adapters with the merged checkpoint, under the names that the merge recorded."""
    base = base_of_checkpoint(checkpoint)
    # The kinds that the merge used, including those given by --kind.
    kinds = {
        name: replace(layer, kind=merged.kind)
        for name, merged in record.sites.items()
        if (layer := base.layers.get(name)) and layer.has_weight and layer.dtype in ADAPTABLE
    }
    base = replace(base, layers={**base.layers, **kinds})
    root = checkpoint.directory / UNDO / ADAPTERS
    return [pair_as(read_adapter(root / str(number)), base, adapter.names).demand(base) for number, adapter in enumerate(record.adapters)]


def _copy(source: FileTensor, target: FileTensor, workers: Workers) -> None:
    for nbytes in copy_bytes(source, target):
        workers.advance(nbytes)
