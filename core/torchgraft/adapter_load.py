"""Loading an adapter directory onto a model in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from torchgraft.adapter import Adapter
from torchgraft.adapter_files import AdapterFiles, read_adapter
from torchgraft.attaching import attach
from torchgraft.bases import PairedSite, Pairing, base_of_module
from torchgraft.errors import PairingError, TorchgraftWarning
from torchgraft.pairing import pair
from torchgraft.planning import Plan
from torchgraft.site import Site


def load(model: nn.Module, directory: str | Path, *, name: str = "default") -> Adapter:
    """Attach the adapter saved in `directory`, by torchgraft or by PEFT.

    Raises:
        FileFormatError: the directory or a file in it is missing or broken.
        PairingError: the adapter does not fit the model: a tensor is missing, left over or of another shape, or the
            model's weights are not those that it was made for. The model is then unchanged.
    """
    base = base_of_module(model)
    files = read_adapter(directory)
    pairing = pair(files, base).demand(base)
    state = files.read_state()
    tensors = read_tensors(pairing)
    sites = {paired.site.name: paired for paired in pairing.sites}
    layers = tuple(base.layers[site] for site in sites)
    chosen = Plan(tuple(dict.fromkeys(base.layers.values())), layers, {}, pairing.also_train)
    configs = {site: paired.config for site, paired in sites.items()}

    def make(site: Site) -> dict[str, Tensor]:
        return site_tensors(pairing, sites[site.name], tensors)

    adapter = attach(Adapter(model, name, pairing.method.name, pairing.config, chosen), configs, make)
    adapter.state.update(state)
    warn_of_other_weights(files, adapter.sites)
    _fill_copies(adapter, pairing, tensors)
    return adapter


def warn_of_other_weights(files: AdapterFiles, sites: Iterable[Site]) -> None:
    """Say where an adapter that was trained on quantised weights, or over other adapters, meets other weights."""
    recorded = {site["name"]: site for site in files.native.get("sites", [])}
    quantized, alone = [], []
    for site in sites:
        record = recorded.get(site.name, {})
        if record.get("quantization", site.quantization) != site.quantization:
            quantized.append(site)
        if record.get("beneath") and not (site.beneath and site.beneath.names()):
            alone.append(site)
    if quantized:
        was, now = recorded[quantized[0].name]["quantization"], quantized[0].quantization or quantized[0].dtype
        _warn(
            quantized,
            f"it was trained on quantized weights, {was}, and here they are {now}: its effect will not be quite the same",
        )
    if alone:
        names = ", ".join(recorded[alone[0].name]["beneath"])
        _warn(alone, f"it was trained over {names}, and depends on that: it must be in the weights or on the layer before")


def _warn(sites: list[Site], text: str) -> None:
    more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    warnings.warn(f"{sites[0].name}{more}: {text}", TorchgraftWarning, stacklevel=4)


def read_tensors(pairing: Pairing) -> dict[str, Tensor]:
    """The adapter's tensors by their names in its file.

    Raises:
        PairingError: one of them is not finite.
    """
    tensors = pairing.files.read_all()
    where = {name: (paired.site.name, suffix) for paired in pairing.sites for suffix, name in paired.tensors.items()}
    where |= {name: (own.rpartition(".")[0], own.rpartition(".")[2]) for own, name in pairing.trained.items()}
    for name, (layer, leaf) in where.items():
        if not tensors[name].isfinite().all():
            raise PairingError(
                f"{layer}: the adapter's {leaf} has NaN or infinite entries, as after a run that diverged; use an earlier save"
            )
    return tensors


def site_tensors(pairing: Pairing, paired: PairedSite, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One site's tensors as the method names them."""
    found = {suffix: tensors[name] for suffix, name in paired.tensors.items()}
    if pairing.files.peft and pairing.method.peft is not None:
        return pairing.method.peft.from_tensors(paired.site, paired.config, found, pairing.config)
    return found


@torch.no_grad()
def _fill_copies(adapter: Adapter, pairing: Pairing, tensors: dict[str, Tensor]) -> None:
    for module, copy in adapter.copies.items():
        for key, target in copy.module.state_dict().items():
            target.copy_(tensors[pairing.trained[f"{module}.{key}"]])
