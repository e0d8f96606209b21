"""Write an adapter for tools that read only PEFT's formats: as PEFT's type for its method, or as a plain LoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from torchgraft.adapter_files.peft_lora import LowRankPeft
from torchgraft.adapter_files.reading import read_adapter
from torchgraft.adapter_files.writing import Contents, SavedSite, write
from torchgraft.arithmetic.layer_merge import Applied, changes_bias, check_no_bias
from torchgraft.arithmetic.precision import exactly, widened
from torchgraft.checkpoint.reading import Checkpoint, open_checkpoint
from torchgraft.disk import new_directory, refuse_existing
from torchgraft.errors import ConfigError, MergeError
from torchgraft.layers.layer import Layer
from torchgraft.layers.of_checkpoint import module_names
from torchgraft.method.config import Config, LowRankConfig
from torchgraft.method.method import Method
from torchgraft.method.site import Site, to_canonical
from torchgraft.pairing.base import base_of_checkpoint, base_of_record
from torchgraft.pairing.matching import pair
from torchgraft.pairing.pairing import PairedSite, Pairing
from torchgraft.pairing.tensors import AdapterTensors
from torchgraft.plugin.method_hooks import MethodHooks
from torchgraft.plugin.registry import registry

PLAIN = Method("LORA", LowRankConfig, "", "", peft=LowRankPeft())
"""PEFT's plain LORA type."""


@dataclass(frozen=True)
class ExportReport:
    output: Path
    sites: int
    left_out: tuple[str, ...] = ()
    """Sites of rank 0, which are not written: they change nothing, and PEFT has no LoRA of rank 0."""
    errors: dict[str, float] = field(default_factory=dict)
    """Site → ‖Δ - s·B·A‖ / ‖Δ‖ where the change Δ of the weight was approximated; empty if the export is the same function."""


@dataclass(frozen=True)
class Exported:
    """An adapter in the form in which it will be written."""

    method: Method
    config: Config
    sites: Sequence[SavedSite]
    errors: Mapping[str, float] = field(default_factory=dict)


def export_adapter(
    adapter: str | Path,
    output: str | Path,
    to: Literal["lora", "peft"],
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    kinds: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write the adapter in PEFT's format, without torchgraft.json, to the new directory `output`.

    Args:
        to: "peft" for the type that PEFT has for the method; "lora" for PEFT's plain LoRA.
        base: the checkpoint; required for `rank`, and if PEFT wrote the adapter.
        rank: for a method that is not a LoRA: write the nearest LoRA of this rank, by the SVD of merged - base.

    Raises:
        MergeError: the method cannot be written in this form; the message names the alternative.
        FileFormatError, PairingError: a file is broken, or the adapter does not fit its base.
    """
    target = Path(output)
    refuse_existing(target)
    if rank is not None and (to == "peft" or base is None):
        raise ConfigError("a rank is for the nearest LoRA of a method that is none, and needs its base: --to lora --rank R --base MODEL")
    files = read_adapter(adapter)
    checkpoint = open_checkpoint(base) if base is not None else None
    known = base_of_checkpoint(checkpoint, kinds) if checkpoint is not None else base_of_record(files)
    pairing = pair(files, known).demand(known)
    tensors = AdapterTensors(pairing)
    if to == "peft":
        exported = _as_peft(pairing, tensors)
    else:
        nearest = Nearest(checkpoint, known.layers, rank) if checkpoint is not None and rank is not None else None
        exported = _as_plain_lora(pairing, tensors, nearest)
    if not exported.sites:
        raise MergeError(f"{files.directory}: every layer has rank 0, so there is nothing to write")
    with new_directory(target) as directory:
        write(_contents(exported, pairing, tensors, checkpoint), directory, native=False)
    written = {saved.site.name for saved in exported.sites}
    skipped = tuple(paired.site.name for paired in pairing.sites if paired.site.name not in written)
    return ExportReport(target, len(exported.sites), skipped, dict(exported.errors))


def _as_peft(pairing: Pairing, tensors: AdapterTensors) -> Exported:
    """Keep the method, in the type that PEFT has for it.

    Raises:
        MergeError: PEFT has none.
    """
    if pairing.method.peft is None:
        raise MergeError(
            f"{pairing.files.directory}: PEFT has no {pairing.method.name}; 'adapt merge' makes a model that every tool can load"
        )
    sites = [SavedSite(paired.site, paired.config, tensors.of_site(paired), "") for paired in pairing.sites]
    return Exported(pairing.method, pairing.config, sites)


def _as_plain_lora(pairing: Pairing, tensors: AdapterTensors, nearest: Nearest | None) -> Exported:
    """Fold every site into a plain LoRA, exactly or, with `nearest`, approximately."""
    hooks = registry().hooks(pairing.method.name)
    folded = [_folded(hooks, paired, tensors.params(paired), nearest) for paired in pairing.sites]
    errors = {fold.site.name: fold.error for fold in folded if fold.error is not None}
    config, sites = _with_one_alpha([fold for fold in folded if len(fold.factors["A"])])
    return Exported(PLAIN, config, sites, errors)


def _contents(exported: Exported, pairing: Pairing, tensors: AdapterTensors, checkpoint: Checkpoint | None) -> Contents:
    """Return the config and tensors to write, under the module names of the adapter that was read."""
    names = {own: name for name, own in pairing.renamed.items()}
    sites = [replace(saved, site=replace(saved.site, name=names.get(saved.site.name, saved.site.name))) for saved in exported.sites]
    whole = {name: _whole(name, pairing, tensors.by_name) for name in (names.get(module, module) for module in pairing.also_train)}
    return Contents(
        method=exported.method,
        config=exported.config,
        sites=sites,
        trained=whole,
        also_train=tuple(whole),
        also_saved={},
        modules=None if checkpoint is None or names else module_names(checkpoint),
        base=pairing.files.base,
    )


@dataclass(frozen=True)
class Nearest:
    """The base weights, and the rank of the wanted approximation."""

    checkpoint: Checkpoint
    layers: Mapping[str, Layer]
    rank: int


@dataclass(frozen=True)
class Folded:
    """One site as a plain LoRA: ΔW = scale·B·A, except for `error`."""

    site: Site
    scale: float
    factors: dict[str, Tensor]
    error: float | None = None


def _folded(hooks: MethodHooks, paired: PairedSite, params: dict[str, Tensor], nearest: Nearest | None) -> Folded:
    """Fold one site into a plain LoRA: exactly if the method can, else the nearest one."""
    site = paired.site
    applied = Applied(hooks, paired.config, params)
    if not site.has_bias:
        check_no_bias(site.name, applied, site.out_features)
    elif changes_bias(applied, site.out_features):
        raise MergeError(f"{site.name}: {hooks.method.name} changes its bias, too, and a LoRA changes none; merge it ('adapt merge')")
    if hooks.has("adapter_to_lora"):
        if nearest is not None:
            raise ConfigError(f"{hooks.method.name} is the same function as a LoRA of its own rank; leave out the rank")
        return Folded(site, *hooks.to_lora(site, paired.config, params))
    if nearest is None:
        raise MergeError(
            f"{site.name}: no LoRA equals the change that {hooks.method.name} makes to it. Merge it "
            "('adapt merge'), or write the nearest LoRA of a rank that you choose: --rank R --base MODEL"
        )
    weight = to_canonical(site.kind, nearest.checkpoint.read(nearest.layers[site.name].weight_name))
    with exactly(weight):
        change = hooks.merge(paired.config, widened(params, weight.dtype), weight) - weight
    return Folded(site, 1.0, *nearest_lora(change, nearest.rank))


def nearest_lora(change: Tensor, rank: int) -> tuple[dict[str, Tensor], float]:
    """Return A (r, k) and B (d, r) that minimize ‖change - B·A‖, and the relative error, in the Frobenius norm (Eckart and Young 1936)."""
    u, sigma, vh = torch.linalg.svd(change, full_matrices=False)
    root = sigma[:rank].sqrt()
    whole = float(sigma.double().square().sum().sqrt())
    dropped = float(sigma[rank:].double().square().sum().sqrt())
    return {"A": (root[:, None] * vh[:rank]).contiguous(), "B": (u[:, :rank] * root).contiguous()}, dropped / whole if whole else 0.0


def _with_one_alpha(folded: Sequence[Folded]) -> tuple[LowRankConfig, list[SavedSite]]:
    """Use one lora_alpha for all sites, because some tools read no other. Where s·r differs, B is multiplied by the ratio."""
    strengths = Counter(fold.scale * len(fold.factors["A"]) for fold in folded)
    alpha = strengths.most_common(1)[0][0] if strengths else 1.0
    sites = []
    for fold in folded:
        a, b = fold.factors["A"], fold.factors["B"]
        if (ratio := fold.scale * len(a) / alpha) != 1:
            b = b.float() * ratio
        sites.append(SavedSite(fold.site, LowRankConfig(rank=len(a), alpha=alpha), {"A": a, "B": b}, ""))
    return LowRankConfig(alpha=alpha), sites


def _whole(module: str, pairing: Pairing, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the state of a fully trained module, which the adapter calls `module`."""
    start = f"{pairing.files.prefix}{module}."
    return {name.removeprefix(start): tensors[name] for name in pairing.trained.values() if name.startswith(start)}
