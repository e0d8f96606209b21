"""What a merge changes: for each tensor of the output, the adapters that are merged into it or the tensor that replaces it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torchgraft.adapter_files.reading import read_adapter
from torchgraft.checkpoint.reading import Checkpoint
from torchgraft.errors import MergeError
from torchgraft.hashes import sha256_of_file
from torchgraft.kinds.kind import Kind
from torchgraft.kinds.quantization import Quantization
from torchgraft.on_files.merge_record import refuse_merged
from torchgraft.pairing.base import Base
from torchgraft.pairing.matching import pair
from torchgraft.pairing.other_weights import warn_of_other_weights
from torchgraft.pairing.pairing import PairedSite, Pairing
from torchgraft.plugin.method_hooks import MethodHooks
from torchgraft.plugin.registry import registry

Onto = Literal["quantized", "original"]


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a merge."""

    pairing: Pairing
    hooks: MethodHooks
    factor: float = 1.0

    @property
    def path(self) -> Path:
        return self.pairing.files.directory


@dataclass(frozen=True)
class Change:
    """Why one tensor of the output differs from the base's."""

    sites: Sequence[tuple[int, PairedSite]] = ()
    """(index of the ingredient, site) of everything that is merged into the tensor, in order."""
    replaced: tuple[int, str] | None = None
    """(index of the ingredient, name in its file) of the tensor that replaces this one."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """How the weight is quantized and dequantized before anything is merged into it."""
    is_bias: bool = False

    @property
    def kind(self) -> Kind | None:
        """The kind of the layer whose weight it is; None if it is not a weight."""
        if self.is_bias:
            return None
        return self.sites[0][1].site.kind if self.sites else registry().kind("Linear") if self.quantization else None


def ingredients_of(checkpoint: Checkpoint, base: Base, adapters: Mapping[str | Path, float]) -> list[Ingredient]:
    """Pair each adapter (path → factor) with the base.

    Raises:
        MergeError: an adapter is merged already, or given twice.
        FileFormatError, PairingError: a file is broken, or an adapter does not fit.
    """
    found = [_ingredient(checkpoint, base, path, factor) for path, factor in adapters.items()]
    hashes = [sha256_of_file(one.pairing.files.tensor_file) for one in found] if len(found) > 1 else []
    for number, digest in enumerate(hashes):
        if digest in hashes[:number]:
            raise MergeError(f"{found[number].path}: this adapter is given twice; give it once, with the sum of the factors")
    return found


def _ingredient(checkpoint: Checkpoint, base: Base, path: str | Path, factor: float) -> Ingredient:
    files = read_adapter(path)
    refuse_merged(checkpoint, files)
    pairing = pair(files, base).demand(base)
    return Ingredient(pairing, registry().hooks(pairing.method.name), factor)


def order_note(ingredients: Sequence[Ingredient]) -> str:
    """Return a note on the order in which several adapters are merged, if one of them depends on it; else an empty string.

    Raises:
        MergeError: an adapter whose method is not additive has a factor.
    """
    ordered = [one for one in ingredients if not one.hooks.method.additive]
    for one in ordered:
        if one.factor != 1:
            raise MergeError(
                f"{one.path}: the change that {one.hooks.method.name} makes depends on the weight, so it cannot be merged with a "
                f"factor of {one.factor:g}; only additive methods can"
            )
    if not ordered or len(ingredients) == 1:
        return ""
    names = ", ".join(f"{one.path} ({one.hooks.method.name})" for one in ingredients)
    return f"merged in this order, because the change of {ordered[0].hooks.method.name} depends on it: {names}"


def changes_of(ingredients: Sequence[Ingredient]) -> dict[str, Change]:
    """Return tensor of the output → what changes it.

    Raises:
        MergeError: a fully trained module has a factor, or another adapter changes it too.
    """
    weights, biases = defaultdict[str, list[tuple[int, PairedSite]]](list), defaultdict[str, list[tuple[int, PairedSite]]](list)
    for number, ingredient in enumerate(ingredients):
        for paired in ingredient.pairing.sites:
            if ingredient.hooks.merges_weight:
                weights[f"{paired.site.name}.weight"].append((number, paired))
            if ingredient.hooks.merges_bias and paired.site.has_bias:
                biases[f"{paired.site.name}.bias"].append((number, paired))
    changes = {name: Change(sites) for name, sites in weights.items()}
    changes |= {name: Change(sites, is_bias=True) for name, sites in biases.items()}
    for number, ingredient in enumerate(ingredients):
        for name, tensor in ingredient.pairing.trained.items():
            if ingredient.factor != 1:
                raise MergeError(
                    f"{name}: {ingredient.path} contains this module fully trained, which cannot be merged with a factor of "
                    f"{ingredient.factor:g}"
                )
            if name in changes:
                raise MergeError(
                    f"{name}: {ingredient.path} contains this module fully trained, and another adapter changes it too; merge one of them"
                )
            changes[name] = Change(replaced=(number, tensor))
    return changes


def quantization_of(ingredients: Sequence[Ingredient], base: Base, onto: Onto | None) -> dict[str, dict[str, Any]]:
    """Return layer of the base → how it is to be quantized before the merge; empty to merge onto the base's own weights.

    With `onto` quantized (the default if an adapter records it), these are all layers that were quantized during training.

    Raises:
        MergeError: `onto` cannot be done.
    """
    recorded = {} if onto == "original" else _recorded_quantization(ingredients)
    if onto == "quantized" and not recorded:
        raise MergeError("--onto quantized: no adapter records how its base was quantized; merge with --onto original")
    int8 = [name for name, how in recorded.items() if how.get("type") == "int8"]
    if onto == "quantized" and int8:
        raise MergeError(f"{int8[0]}: it was trained on 8-bit weights, whose round trip is not supported; use --onto original")
    if int8:
        return {}
    for name, how in recorded.items():
        layer = base.layers.get(name)
        if layer is None or layer.kind != "Linear":
            raise MergeError(
                f"{name}: it was quantized when the adapter was trained, and the base has no such linear layer; use --onto original"
            )
        Quantization.recorded(how)
    return recorded


def _recorded_quantization(ingredients: Sequence[Ingredient]) -> dict[str, dict[str, Any]]:
    """Return layer of the base → how it was quantized when an adapter was trained, and from what dtype."""
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
                raise MergeError(f"{name}: the adapters were trained on different quantizations of it; use --onto original")
    return recorded


def requantized(changes: Mapping[str, Change], quantization: Mapping[str, Mapping[str, Any]]) -> dict[str, Change]:
    """Return the changes, with `quantization` (layer → how) applied to every weight that no trained tensor replaces."""
    found = dict(changes)
    for layer, how in quantization.items():
        change = found.get(f"{layer}.weight", Change())
        found[f"{layer}.weight"] = change if change.replaced is not None else replace(change, quantization=how)
    return found


def warn_of_other_bases(ingredients: Sequence[Ingredient], *, is_requantized: bool) -> None:
    """Warn if an adapter was trained on other weights than those that it is merged into."""
    for number, one in enumerate(ingredients):
        sites = [paired.site for paired in one.pairing.sites]
        warn_of_other_weights(one.pairing, sites, requantized=is_requantized, over_others=number > 0)


@dataclass(frozen=True)
class Untied:
    """The effect of a merge on tied weights."""

    needed: bool = False
    """Whether a tied weight changes, so that the two layers need a weight each."""
    added: Mapping[str, str] = field(default_factory=dict)
    """Tensor that the files lack, such as the head's weight → the tensor that it starts from."""


def untied(changes: Mapping[str, Change], base: Base) -> Untied:
    """Return which tied weights a merge separates.

    Raises:
        MergeError: a changed weight is tied to another that files cannot separate.
    """
    needed, added = False, dict[str, str]()
    for name in changes:
        layer = base.layers.get(name.rpartition(".")[0])
        if layer is None or not layer.tied or not name.endswith(".weight"):
            continue
        if layer.tie_problem:
            raise MergeError(layer.tie_problem)
        needed = True
        added |= {f"{other.name}.weight": other.weight_name for other in (layer, base.layers[layer.tied[0]]) if other.weight_of}
    return Untied(needed, added)
