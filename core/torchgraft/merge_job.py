"""One merge in files: which tensor is changed by what. Merging, verifying and unmerging all work on it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from torchgraft import exact
from torchgraft.adapter_load import site_tensors
from torchgraft.bases import Base, PairedSite, Pairing
from torchgraft.checkpoint import Checkpoint, read_tensor
from torchgraft.errors import FileFormatError, MergeError
from torchgraft.manager import MethodHooks, registry
from torchgraft.safetensors_header import Header, TensorEntry
from torchgraft.weights import merged_weight, nearly_unmerged, rounded, undo_tensors

CHUNK = 1 << 23

Progress = Callable[[int], None]
"""Called with the number of bytes that were just written."""


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
            return rounded(name, self.tensors[self.replaced[name]], original)
        paired = self.sites[name]
        return merged_weight(self.hooks, paired.site.name, paired.site.kind, paired.config, self.params(paired), original)

    def undo_tensors(self, name: str, original: Tensor) -> dict[str, Tensor]:
        """What the method needs to unmerge the tensor `name`."""
        paired = self.sites[name]
        return undo_tensors(self.hooks, paired.site.kind, paired.config, self.params(paired), original)

    def nearly_unmerged(self, name: str, merged: Tensor, needed: Mapping[str, Tensor]) -> Tensor:
        paired = self.sites[name]
        return nearly_unmerged(self.hooks, paired.site.kind, paired.config, self.params(paired) | dict(needed), merged)

    @property
    def changed(self) -> set[str]:
        return {*self.sites, *self.replaced}


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


def write_weights(
    checkpoint: Checkpoint, directory: Path, names: Collection[str], change: Callable[[str, Tensor], Tensor], progress: Progress
) -> None:
    """Every weight file under its own header: the tensors in `names` as `change` makes them, the others byte for byte."""
    for header in checkpoint.headers:
        path = directory / relative_name(checkpoint, header)
        path.parent.mkdir(parents=True, exist_ok=True)
        with header.path.open("rb") as source, path.open("wb") as target:
            target.write(header.raw)
            for entry in header.in_file_order:
                if entry.name in names:
                    target.write(exact.as_bytes(change(entry.name, read_tensor(source, entry))))
                    progress(entry.end - entry.begin)
                else:
                    _copy_bytes(source, target, entry, progress)


def _copy_bytes(source: BinaryIO, target: BinaryIO, entry: TensorEntry, progress: Progress) -> None:
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
