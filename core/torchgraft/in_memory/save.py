"""Saving an adapter that is on a model."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchgraft.adapter_files.writing import Contents, SavedSite, also_saved, write
from torchgraft.graft import SitePart
from torchgraft.method.site import fingerprint_of
from torchgraft.module_merge import frozen_fingerprint
from torchgraft.plugin.registry import registry

if TYPE_CHECKING:
    from torchgraft.adapter import Adapter


def save(adapter: Adapter, directory: str | PathLike[str]) -> None:
    """Write `adapter` into `directory`, which is made if need be; each file is replaced in one step."""
    from torchgraft.layers.of_module import named_base_modules, own_state

    modules = [name for name, _ in named_base_modules(adapter.model)]
    contents = Contents(
        method=registry().method(adapter.method),
        config=adapter.config,
        sites=[_saved(part) for part in adapter.parts.values()],
        trained={name: copy.module.state_dict() for name, copy in adapter.copies.items()},
        also_train=adapter.plan.trained,
        also_saved={name: own_state(adapter.model.get_submodule(name)) for name in also_saved(adapter.plan.trained, modules)},
        modules=modules,
        base=getattr(getattr(adapter.model, "config", None), "_name_or_path", None) or None,
        state=adapter.state,
        shared=next((part.shared.digests() for part in adapter.parts.values() if part.shared is not None), {}),
        quantized=_quantized(adapter),
    )
    write(contents, Path(directory))


def _quantized(adapter: Adapter) -> dict[str, dict[str, Any]]:
    from torchgraft.layers.of_module import layers_of_module

    found = {}
    for layer in layers_of_module(adapter.model, registry().kinds()):
        if layer.kind is not None and layer.name not in adapter.parts and (kind := registry().kind(layer.kind)).quantized:
            found[layer.name] = {**kind.quantization(adapter.model.get_submodule(layer.name)), "from": layer.dtype}
    return found


def _saved(part: SitePart) -> SavedSite:
    site, beneath = part.site, [] if part.hooks.method.additive or part.site.beneath is None else part.site.beneath.names()
    if part.site.weight_tensors()[0].is_meta:
        known = part.fingerprint
    elif part.undo is not None:
        known = part.undo.fingerprint
    elif part.hooks.method.additive:
        known = frozen_fingerprint(site)
    else:  # of a weight with adapters in it that are not merged, the last bits are those of the arithmetic here
        known = "" if beneath else fingerprint_of(site)
    return SavedSite(site, part.config, part.tensors(), known, beneath)
