"""What a merge will do, decided from headers, configs and names. Nothing is written, and torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

from torchgraft.adapter_files.reading import read_adapter
from torchgraft.checkpoint.layout import Layout, Placed, plan_layout
from torchgraft.checkpoint.reading import INDEX, Checkpoint
from torchgraft.checkpoint.sidecars import Sidecars, sidecars_of
from torchgraft.disk import json_bytes
from torchgraft.dtypes import ADAPTABLE, SIZES
from torchgraft.errors import ConfigError, MergeError
from torchgraft.hashes import sha256_of_file
from torchgraft.kinds.kind import Kind
from torchgraft.kinds.quantization import Quantization
from torchgraft.layers.layer import HEAD
from torchgraft.on_files.merge_record import refuse_merged
from torchgraft.pairing.base import Base, base_of_checkpoint
from torchgraft.pairing.matching import pair
from torchgraft.pairing.other_weights import warn_of_other_weights
from torchgraft.pairing.pairing import PairedSite, Pairing
from torchgraft.plugin.method_hooks import MethodHooks
from torchgraft.plugin.registry import registry

Onto = Literal["quantized", "original"]
SPARSE = 16
"""What is merged takes this many times the bytes of its corrections, or more: 5 to 30 times were measured."""
WORKING = 160 << 20
"""Bytes that the workers need for their blocks of rows."""
WHOLE = 24
"""Bytes for each entry of a weight that cannot be worked on by blocks of rows."""


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a merge."""

    pairing: Pairing
    hooks: MethodHooks
    factor: float = 1.0

    @property
    def path(self) -> Path:
        return self.pairing.files.directory


@dataclass
class Change:
    """What makes one tensor differ from the base's."""

    sites: list[tuple[int, PairedSite]] = field(default_factory=list)
    """The ingredients, by number, that are merged into it, in their order."""
    replaced: tuple[int, str] | None = None
    """The ingredient whose tensor of this name takes its place."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """How the weight is quantised, and dequantised again, before anything is merged into it."""
    is_bias: bool = False
    """Whether it is a layer's bias."""

    @property
    def kind(self) -> Kind | None:
        """Of the layer whose weight it is; None if it is none."""
        if self.is_bias:
            return None
        return self.sites[0][1].site.kind if self.sites else registry().kind("Linear") if self.quantization else None


@dataclass(frozen=True)
class MergePlan:
    checkpoint: Checkpoint
    ingredients: Sequence[Ingredient]
    changes: Mapping[str, Change]
    """Tensor of the output → what happens to it."""
    layout: Layout
    sidecars: Sidecars
    rewritten: Mapping[str, bytes]
    """Files beside the weights whose content the merge changes."""
    notes: Sequence[str]
    """What was decided that the user may not expect."""

    def is_copied(self, placed: Placed) -> bool:
        """Whether the tensor's bytes are the checkpoint's."""
        return placed.name not in self.changes and placed.dtype == self.checkpoint.tensors[placed.source].dtype

    @property
    def correction_bytes(self) -> int:
        """About how many the undo record's corrections take: a sixteenth of what is merged, all of what is replaced or loses bits."""
        total = 0
        for placed in self.layout.tensors:
            stored, change = self.checkpoint.tensors[placed.source], self.changes.get(placed.name)
            whole = change is not None and (change.replaced or change.quantization or change.is_bias)
            narrower = SIZES[placed.dtype] < SIZES[stored.dtype]
            if change is not None or narrower:
                total += (stored.end - stored.begin) // (1 if whole or narrower else SPARSE)
        return total

    @property
    def memory(self) -> int:
        """About how many bytes are needed at a time, beside torch: the adapters, and in each worker some rows in several forms."""
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
    kinds: Mapping[str, str] | None = None,
) -> MergePlan:
    """Pair every adapter with the checkpoint, and refuse what must not be merged.

    Raises:
        FileFormatError, PairingError: a file is broken, or an adapter does not fit.
        MergeError: an adapter is merged already, a weight is shared, or the adapters cannot be combined.
        ConfigError: an option has no such value.
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
    base = base_of_checkpoint(checkpoint, kinds)
    ingredients = [_ingredient(checkpoint, base, path, factor) for path, factor in adapters.items()]
    _refuse_same(ingredients)
    notes = [note for one in ingredients for note in (one.pairing.note, one.pairing.caveat) if note]
    changes = _changes(ingredients, notes)
    _set_quantization(changes, ingredients, base, onto, notes)
    untied, added = _untied(changes, base, notes)
    sidecars = sidecars_of(checkpoint, [ingredient.path for ingredient in ingredients])
    if sidecars.from_adapter:
        notes.append(f"taken from the adapter, not the base: {', '.join(sidecars.from_adapter)}")
    if sidecars.dropped:
        notes.append(f"left out, for the adapter's tokenizer_config.json has its own chat template: {', '.join(sidecars.dropped)}")
    layout = plan_layout(checkpoint, dtype=dtype, max_shard_size=max_shard_size, added=added)
    return MergePlan(checkpoint, ingredients, changes, layout, sidecars, _rewritten(checkpoint, layout, sidecars, dtype, untied), notes)


def _ingredient(checkpoint: Checkpoint, base: Base, path: str | Path, factor: float) -> Ingredient:
    files = read_adapter(path)
    refuse_merged(checkpoint, files)
    pairing = pair(files, base).demand(base)
    return Ingredient(pairing, registry().hooks(pairing.method.name), factor)


def _refuse_same(ingredients: Sequence[Ingredient]) -> None:
    hashes = [sha256_of_file(one.pairing.files.tensor_file) for one in ingredients] if len(ingredients) > 1 else []
    for number, found in enumerate(hashes):
        if found in hashes[:number]:
            raise MergeError(f"{ingredients[number].path}: this adapter is given twice; give it once, with the sum of the factors")


def _changes(ingredients: Sequence[Ingredient], notes: list[str]) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for number, ingredient in enumerate(ingredients):
        for paired in ingredient.pairing.sites:
            if ingredient.hooks.merges_weight:
                changes.setdefault(f"{paired.site.name}.weight", Change()).sites.append((number, paired))
            if ingredient.hooks.merges_bias and paired.site.has_bias:
                changes.setdefault(f"{paired.site.name}.bias", Change(is_bias=True)).sites.append((number, paired))
    for number, ingredient in enumerate(ingredients):
        for name, tensor in ingredient.pairing.trained.items():
            if ingredient.factor != 1:
                raise MergeError(
                    f"{name}: {ingredient.path} holds it trained whole, which cannot be merged with a factor of {ingredient.factor:g}"
                )
            if name in changes:
                raise MergeError(
                    f"{name}: {ingredient.path} holds it trained whole, and another adapter changes it, too; merge one of them"
                )
            changes[name] = Change(replaced=(number, tensor))
    ordered = [one for one in ingredients if not one.hooks.method.additive]
    for one in ordered:
        if one.factor != 1:
            raise MergeError(
                f"{one.path}: the change that {one.hooks.method.name} makes depends on the weight, so it cannot be merged with a "
                f"factor of {one.factor:g}; only additive methods can"
            )
    if ordered and len(ingredients) > 1:
        names = ", ".join(f"{one.path} ({one.hooks.method.name})" for one in ingredients)
        notes.append(f"merged in this order, for what {ordered[0].hooks.method.name} does depends on it: {names}")
    return changes


def _set_quantization(
    changes: dict[str, Change], ingredients: Sequence[Ingredient], base: Base, onto: Onto | None, notes: list[str]
) -> None:
    """`onto` quantized: every layer that an adapter's base had quantised is merged onto what it was trained against."""
    recorded = {} if onto == "original" else _recorded_quantization(ingredients)
    if onto == "quantized" and not recorded:
        raise MergeError("--onto quantized: no adapter records how its base was quantized; merge with --onto original")
    int8 = [name for name, how in recorded.items() if how.get("type") == "int8"]
    if onto == "quantized" and int8:
        raise MergeError(f"{int8[0]}: it was trained on 8-bit weights, whose round trip is not supported; say --onto original")
    if int8:
        recorded = {}
    for number, one in enumerate(ingredients):
        sites = [paired.site for paired in one.pairing.sites]
        warn_of_other_weights(one.pairing, sites, requantized=bool(recorded), over_others=number > 0)
    for name, how in recorded.items():
        layer = base.layers.get(name)
        if layer is None or layer.kind != "Linear":
            raise MergeError(
                f"{name}: it was quantized when the adapter was trained, and the base has no such linear layer; say --onto original"
            )
        Quantization.recorded(how)
        change = changes.setdefault(f"{name}.weight", Change())
        if change.replaced is None:
            change.quantization = how
    if recorded:
        notes.append(
            f"merged onto the weights as quantized, which the adapter was trained against ({len(recorded)} layers); "
            "--onto original takes the base's own"
        )


def _recorded_quantization(ingredients: Sequence[Ingredient]) -> dict[str, dict[str, Any]]:
    """Layer of the base → how it was quantised when an adapter was trained, and from what dtype."""
    recorded: dict[str, dict[str, Any]] = {}
    for one in ingredients:
        record = one.pairing.files.record
        if record is None:
            continue
        sites = [site for site in record.sites if site.quantization]
        found = {**record.quantized, **{site.name: {**site.quantization, "from": site.dtype} for site in sites}}
        for own_name, how in found.items():
            name = one.pairing.modules.get(own_name, own_name)
            if recorded.setdefault(name, how) != how:
                raise MergeError(f"{name}: the adapters were trained on different quantizations of it; say --onto original")
    return recorded


def _untied(changes: Mapping[str, Change], base: Base, notes: list[str]) -> tuple[bool, dict[str, str]]:
    """Whether a tied weight is changed, so that both layers need their own; and the head that the files lack: name → its source."""
    untied, added = False, dict[str, str]()
    for name in changes:
        layer = base.layers.get(name.rpartition(".")[0])
        if layer is None or not layer.tied or not name.endswith(".weight"):
            continue
        if layer.tie_problem:
            raise MergeError(layer.tie_problem)
        untied = True
        added |= {f"{other.name}.weight": other.weight_name for other in (layer, base.layers[layer.tied[0]]) if other.weight_of}
    if untied:
        notes.append(f"the input embedding and {HEAD} shared one weight, and what is merged is not the same for both: each gets its own")
    return untied, added


def _rewritten(checkpoint: Checkpoint, layout: Layout, sidecars: Sidecars, dtype: str, untied: bool) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    if layout.is_new and (layout.index or INDEX in sidecars.files):
        found[INDEX] = json_bytes(layout.index) if layout.index else b""  # one file has none
    if "config.json" in sidecars.files and (dtype or untied):
        config = deepcopy(checkpoint.config)
        for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
            part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part and dtype})
        if untied:
            config["tie_word_embeddings"] = False
        found["config.json"] = json_bytes(config)
    return found
