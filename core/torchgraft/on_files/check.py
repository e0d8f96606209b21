"""Collect every problem that prevents merging an adapter into a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torchgraft.adapter_files.reading import read_adapter
from torchgraft.arithmetic.layer_merge import Applied, is_zero
from torchgraft.checkpoint.reading import open_checkpoint
from torchgraft.checkpoint.sidecars import other_trained_files
from torchgraft.errors import PairingError, TorchgraftError
from torchgraft.on_files.merge_record import merged_already
from torchgraft.pairing.base import Base, base_of_checkpoint
from torchgraft.pairing.matching import pair
from torchgraft.pairing.pairing import Pairing
from torchgraft.pairing.tensors import AdapterTensors, not_finite
from torchgraft.plugin.registry import registry


@dataclass(frozen=True)
class Verdict:
    problems: list[str]
    """Empty if the adapter fits."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """The adapter's name of a site or a module → the base's, where they differ."""
    notes: tuple[str, ...] = ()
    """The same in words, and what cannot be verified."""


def check(model: str | Path, adapter: str | Path, kinds: Mapping[str, str] | None = None) -> Verdict:
    """Check names, shapes, types and values of the adapter's tensors, whether this is its base, and whether it is merged already.

    Raises:
        FileFormatError: the model is missing or broken.
    """
    checkpoint = open_checkpoint(model)
    base = base_of_checkpoint(checkpoint, kinds)
    problems: list[str] = []
    unchanged = ""
    try:
        files = read_adapter(adapter)
        problems += [problem for problem in [merged_already(checkpoint, files)] if problem]
        pairing = pair(files, base)
        problems += [*pairing.problems, *_ties(pairing, base)]
        if pairing.problems:
            problems += not_finite(pairing, files.read)
        else:
            unchanged = _unchanged(pairing, AdapterTensors(pairing))
    except PairingError as error:
        return Verdict([*problems, *error.problems])
    except TorchgraftError as error:
        return Verdict([*problems, str(error)])
    others = [name for name in other_trained_files(files.directory) if files.directory / name not in checkpoint.file_of.values()]
    beside = f"{files.directory}: other trained weights, which a merge does not include: {', '.join(others)}" if others else ""
    notes = (pairing.note, *pairing.remarks, *([] if problems else [pairing.caveat, unchanged]), beside)
    return Verdict(problems, pairing.renamed, tuple(note for note in notes if note))


def _unchanged(pairing: Pairing, tensors: AdapterTensors) -> str:
    """Describe the layers on which the adapter's change is zero; empty if there are none, or if the change depends on the weight."""
    hooks = registry().hooks(pairing.method.name)
    if not (hooks.method.additive and hooks.merges_weight):
        return ""
    dead = []
    for paired in pairing.sites:
        params, site = tensors.params(paired), paired.site
        if all(tensor.numel() for tensor in params.values()) and is_zero(
            Applied(hooks, paired.config, params), (site.out_features, site.in_features)
        ):
            dead.append(site.name)
    if not dead:
        return ""
    return (
        f"the adapter changes nothing on {len(dead)} of its {len(pairing.sites)} layers ({', '.join(dead[:3])}{'…' if dead[3:] else ''}): "
        "its change there is zero. Was it trained, and saved whole? 'adapt merge' refuses it without --allow-unchanged"
    )


def _ties(pairing: Pairing, base: Base) -> list[str]:
    changed = dict.fromkeys((*(paired.site.name for paired in pairing.sites), *pairing.trained))
    layers = {base.layers.get(name) or base.layers.get(name.removesuffix(".weight")): None for name in changed}
    return [layer.tie_problem for layer in layers if layer is not None and layer.tie_problem]
