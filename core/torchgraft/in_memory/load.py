"""Load an adapter directory onto a model in memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from torchgraft.adapter_files.reading import read_adapter
from torchgraft.checkpoint import fingerprint
from torchgraft.checkpoint.sidecars import other_trained_files
from torchgraft.errors import TorchgraftWarning
from torchgraft.in_memory.adapter import Adapter
from torchgraft.in_memory.apply import attach
from torchgraft.layers.plan import Plan
from torchgraft.method.site import Site
from torchgraft.pairing.base import base_of_module
from torchgraft.pairing.matching import pair
from torchgraft.pairing.other_weights import warn_of_other_weights
from torchgraft.pairing.pairing import Pairing
from torchgraft.pairing.tensors import AdapterTensors


def load(model: nn.Module, directory: str | Path, *, name: str = "default") -> Adapter:
    """Attach the adapter saved in `directory`, by torchgraft or by PEFT.

    Raises:
        FileFormatError: the directory or a file in it is missing or broken.
        PairingError: the adapter does not fit the model: a tensor is missing, unexpected or of another shape, or the
            model's weights differ from those that the adapter was trained on. The model is then unchanged.

    On a model without values (on the meta device) the adapter's tensors keep their values, on the CPU. Load the base's values with
    `model.load_state_dict(state, strict=False, assign=True)`; `to_empty` would discard the adapter's values.
    """
    base = base_of_module(model)
    files = read_adapter(directory)
    pairing = pair(files, base).demand(base)
    if pairing.other_plugin:
        warnings.warn(pairing.other_plugin, TorchgraftWarning, stacklevel=2)
    if others := other_trained_files(files.directory):
        warnings.warn(f"{files.directory}: not loaded, other trained weights: {', '.join(others)}", TorchgraftWarning, stacklevel=2)
    state = files.read_state()
    tensors = AdapterTensors(pairing)
    sites = {paired.site.name: paired for paired in pairing.sites}
    layers = tuple(base.layers[site] for site in sites)
    chosen = Plan(tuple(dict.fromkeys(base.layers.values())), layers, {}, pairing.also_train)
    configs = {site: paired.config for site, paired in sites.items()}

    def make(site: Site) -> dict[str, Tensor]:
        return tensors.of_site(sites[site.name])

    adapter = attach(Adapter(model, name, pairing.method.name, pairing.config, chosen), configs, make)
    adapter.state.update(state)
    warn_of_other_weights(pairing, adapter.sites)
    _keep_fingerprints(adapter, pairing)
    _fill_copies(adapter, pairing, tensors.by_name)
    return adapter


def _keep_fingerprints(adapter: Adapter, pairing: Pairing) -> None:
    """Store the recorded fingerprints, because `save` cannot compute them while the weights are on the meta device."""
    for paired in pairing.sites:
        entry = pairing.files.recorded_sites.get(paired.own_name)
        if entry is not None and fingerprint.comparable(paired.site.dtype, entry.dtype):
            adapter.parts[paired.site.name].fingerprint = entry.fingerprint


@torch.no_grad()
def _fill_copies(adapter: Adapter, pairing: Pairing, tensors: dict[str, Tensor]) -> None:
    for name, copy in adapter.copies.items():
        targets: dict[str, Tensor] = copy.module.state_dict(keep_vars=True)
        filled: dict[Tensor, Tensor] = {}  # by tensor, because a tied tensor has several names
        for key, target in targets.items():
            filled[target] = _filled(target, tensors[pairing.trained[f"{name}.{key}"]])
        if any(target.is_meta for target in filled):
            copy.module.load_state_dict({key: filled[target] for key, target in targets.items()}, assign=True)


def _filled(target: Tensor, values: Tensor) -> Tensor:
    """Copy `values` into `target` and return it. For a target on the meta device, return a new tensor that replaces it."""
    if not target.is_meta:
        return target.copy_(values)
    return nn.Parameter(values.to(target.dtype)) if isinstance(target, nn.Parameter) else values.to(target.dtype)
