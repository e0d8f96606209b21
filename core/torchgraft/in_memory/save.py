"""Collect what is saved of an adapter that is attached to a model."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn

from torchgraft.adapter_files.writing import SavedSite
from torchgraft.in_memory.merge import frozen_fingerprint
from torchgraft.in_memory.parts import SitePart
from torchgraft.layers.of_module import layers_of_module
from torchgraft.method.site import fingerprint_of
from torchgraft.plugin.registry import registry


def quantized_beside(model: nn.Module, sites: Container[str]) -> dict[str, dict[str, Any]]:
    """Return layer → its quantization and source dtype, for the quantized layers of `model` that are not among `sites`."""
    found = {}
    for layer in layers_of_module(model, registry().kinds()):
        if layer.kind is not None and layer.name not in sites and (kind := registry().kind(layer.kind)).quantized:
            found[layer.name] = {**kind.quantization(model.get_submodule(layer.name)), "from": layer.dtype}
    return found


def saved_site(part: SitePart) -> SavedSite:
    """Return the record of one site: its options, tensors, fingerprint and, if the method is not additive, the earlier adapters."""
    site, beneath = part.site, [] if part.hooks.method.additive or part.site.beneath is None else part.site.beneath.names()
    if part.site.weight_tensors()[0].is_meta:
        known = part.fingerprint
    elif part.undo is not None:
        known = part.undo.fingerprint
    elif part.hooks.method.additive:
        known = frozen_fingerprint(site)
    else:  # with unmerged earlier adapters the last bits of the weight depend on this machine's arithmetic
        known = "" if beneath else fingerprint_of(site)
    return SavedSite(site, part.config, part.tensors(), known, beneath)
