"""The plan of a merge, decided from headers, configs and names. Nothing is written, and torch is not imported."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import get_args

from torchgraft.checkpoint.layout import Layout, Placed, plan_layout
from torchgraft.checkpoint.reading import INDEX, Checkpoint
from torchgraft.checkpoint.sidecars import Sidecars, other_trained_files, sidecars_of
from torchgraft.checkpoint.tokenizers import refuse_more_ids
from torchgraft.disk import json_bytes
from torchgraft.dtypes import ADAPTABLE, BITS
from torchgraft.errors import ConfigError, MergeError, near
from torchgraft.layers.layer import HEAD
from torchgraft.layers.of_checkpoint import is_input_embedding
from torchgraft.on_files.merge_changes import (
    Change,
    Ingredient,
    Onto,
    changes_of,
    ingredients_of,
    order_note,
    quantization_of,
    requantized,
    untied,
    warn_of_other_bases,
)
from torchgraft.pairing.base import base_of_checkpoint

SPARSEST = 5
"""Lowest measured ratio of merged bytes to the bytes of their corrections; 5 to 30 were measured. The check of disk space uses it."""
WORKING = 160 << 20
"""Bytes that the workers need for their blocks of rows."""
WHOLE = 24
"""Bytes for each entry of a weight that cannot be processed by blocks of rows."""


@dataclass(frozen=True)
class MergePlan:
    checkpoint: Checkpoint
    ingredients: Sequence[Ingredient]
    changes: Mapping[str, Change]
    """Tensor of the output → what changes it."""
    layout: Layout
    sidecars: Sidecars
    rewritten: Mapping[str, bytes]
    """Name → content of the other files that the merge changes."""
    notes: Sequence[str]
    """Decisions that the user may not expect."""

    def is_copied(self, placed: Placed) -> bool:
        """Whether the tensor's bytes are copied from the checkpoint."""
        return placed.name not in self.changes and placed.dtype == self.checkpoint.tensors[placed.source].dtype

    @property
    def correction_bytes(self) -> int:
        """An upper estimate of the size of the corrections: all bytes of what is replaced or narrowed, a share of what is merged."""
        total = 0
        for placed in self.layout.tensors:
            stored, change = self.checkpoint.tensors[placed.source], self.changes.get(placed.name)
            whole = change is not None and (change.replaced or change.quantization or change.is_bias)
            narrower = BITS[placed.dtype] < BITS[stored.dtype]
            if change is not None or narrower:
                total += (stored.end - stored.begin) // (1 if whole or narrower else SPARSEST)
        return total

    @property
    def memory(self) -> int:
        """Estimate of the peak memory in bytes, without torch itself: the adapters, and blocks of rows in every worker."""
        adapters = sum(one.pairing.files.tensor_file.stat().st_size for one in self.ingredients)
        whole = [
            self.checkpoint.tensors[name].numel * WHOLE
            for name, change in self.changes.items()
            if change.quantization or not all(self.ingredients[number].hooks.merges_rows for number, _ in change.sites)
        ]
        return adapters + WORKING + max(whole, default=0)


def plan_merge(
    checkpoint: Checkpoint,
    adapters: Mapping[str | Path, float],
    *,
    dtype: str = "",
    onto: Onto | None = None,
    max_shard_size: int = 0,
    leave_out: Collection[str] = (),
    kinds: Mapping[str, str] | None = None,
) -> MergePlan:
    """Pair every adapter with the checkpoint, and decide what happens to each tensor and file.

    Raises:
        FileFormatError, PairingError: a file is broken, or an adapter does not fit.
        MergeError: an adapter is merged already, a weight is shared, the adapters cannot be combined, or files beside them do not fit.
        ConfigError: an option is invalid.
    """
    _check_options(adapters, dtype, onto, max_shard_size)
    base = base_of_checkpoint(checkpoint, kinds)
    ingredients = ingredients_of(checkpoint, base, adapters)
    unmerged = _other_trained_files(checkpoint, ingredients, leave_out)
    order = order_note(ingredients)
    quantization = quantization_of(ingredients, base, onto)
    changes = requantized(changes_of(ingredients), quantization)
    warn_of_other_bases(ingredients, is_requantized=bool(quantization))
    separated = untied(changes, base)
    sidecars = sidecars_of(checkpoint, [ingredient.path for ingredient in ingredients])
    if rows := [layer.shape[0] for layer in base.layers.values() if is_input_embedding(layer)]:
        refuse_more_ids(sidecars.own, sidecars.from_adapter, max(rows))
    notes = [
        *(note for one in ingredients for note in (one.pairing.note, *one.pairing.remarks, one.pairing.caveat)),
        order,
        f"merged onto the weights as quantized, on which the adapter was trained ({len(quantization)} layers); "
        "--onto original takes the base's own"
        if quantization
        else "",
        f"the input embedding and {HEAD} shared one weight, and the merge changes them differently: each gets a weight of its own"
        if separated.needed
        else "",
        *_sidecar_notes(sidecars),
        f"not merged (--leave-out): {', '.join(unmerged)}" if unmerged else "",
    ]
    layout = plan_layout(checkpoint, dtype=dtype, max_shard_size=max_shard_size, added=separated.added)
    rewritten = _rewritten(checkpoint, layout, sidecars, dtype, separated.needed)
    return MergePlan(checkpoint, ingredients, changes, layout, sidecars, rewritten, [note for note in notes if note])


def _check_options(adapters: Mapping[str | Path, float], dtype: str, onto: str | None, max_shard_size: int) -> None:
    """Check the options of a merge.

    Raises:
        ConfigError: there is no adapter, or an option is invalid.
    """
    if not adapters:
        raise ConfigError("there is no adapter to merge")
    if onto not in (None, *get_args(Onto)):
        raise ConfigError(f"onto: {onto!r}; it can be {' or '.join(get_args(Onto))}")
    if max_shard_size < 0:
        raise ConfigError(f"max_shard_size: {max_shard_size}; it is a number of bytes")
    if odd := [factor for factor in adapters.values() if not isfinite(factor)]:
        raise ConfigError(f"the factor of an adapter is {odd[0]}; it must be a finite number")
    if dtype and dtype not in ADAPTABLE:
        raise ConfigError(f"dtype: {dtype!r}; it can be {', '.join(sorted(ADAPTABLE))}")


def _other_trained_files(checkpoint: Checkpoint, ingredients: Sequence[Ingredient], leave_out: Collection[str]) -> list[str]:
    """Return the names of the files with other trained weights beside the adapters.

    Raises:
        MergeError: one of them is not to be left out.
        ConfigError: one of `leave_out` is not beside an adapter.
    """
    weights = {header.path for header in checkpoint.headers}
    found = [one.path / name for one in ingredients for name in other_trained_files(one.path) if one.path / name not in weights]
    names = [path.name for path in found]
    if missing := [name for name in leave_out if name not in names]:
        raise ConfigError(f"leave out {missing[0]}: no such file with weights lies beside an adapter{near(missing[0], names)}")
    for path in found:
        if path.name not in leave_out:
            raise MergeError(
                f"{path}: trained weights beside the adapter, which a merge of the adapter does not include. The result would be half of "
                f"what was trained; to leave them out: --leave-out {path.name}"
            )
    return names


def _sidecar_notes(sidecars: Sidecars) -> list[str]:
    """Return a note for each kind of file that does not come from the base as it is."""
    from_adapter, dropped, of_adapter = (", ".join(names) for names in (sidecars.from_adapter, sidecars.dropped, sidecars.of_adapter))
    return [
        f"taken from the adapter, not the base: {from_adapter}" if from_adapter else "",
        f"not copied, because the adapter's files replace this set of the base's: {dropped}" if dropped else "",
        f"not copied, because transformers would load this adapter on top of the merged weights: {of_adapter}" if of_adapter else "",
    ]


def _rewritten(checkpoint: Checkpoint, layout: Layout, sidecars: Sidecars, dtype: str, is_untied: bool) -> dict[str, bytes]:
    """Return name → new content of the index and config.json, where the merge changes them."""
    found: dict[str, bytes] = {}
    index = checkpoint.index or INDEX
    if layout.is_new and (layout.index or index in sidecars.files):
        found[index] = json_bytes(layout.index) if layout.index else b""  # a single file has no index
    if "config.json" in sidecars.files and (dtype or is_untied):
        config = deepcopy(checkpoint.config)
        for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
            part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part and dtype})
        if is_untied:
            config["tie_word_embeddings"] = False
        found["config.json"] = json_bytes(config)
    return found
