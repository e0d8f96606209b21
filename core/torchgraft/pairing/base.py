"""Describe a base for pairing: a module, a checkpoint, or what an adapter's record shows of its base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from torchgraft.adapter_files.reading import AdapterFiles
from torchgraft.checkpoint import fingerprint
from torchgraft.checkpoint.reading import Checkpoint
from torchgraft.errors import FileFormatError
from torchgraft.kinds.kind import Shape
from torchgraft.layers.layer import Layer, by_name, is_inside
from torchgraft.layers.of_checkpoint import layers_of_checkpoint
from torchgraft.layers.plan import site_of
from torchgraft.method.site import fingerprint_of
from torchgraft.pairing import transformers_names
from torchgraft.pairing.naming import Naming, owner_of
from torchgraft.pairing.transformers_names import Architecture
from torchgraft.plugin.registry import registry

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Base:
    """The parts of a model or a checkpoint that pairing uses."""

    label: str
    layers: Mapping[str, Layer]
    tensors: Mapping[str, Shape]
    fingerprint: Callable[[str], str]
    """Returns the fingerprint of a layer's weight."""
    is_module: bool
    namings: Callable[[], Iterable[Naming]] = list
    """Returns transformers' other names for the tensors; may be slow, or raise PairingError."""

    architecture: Callable[[], Architecture | None] = lambda: None
    """Returns what transformers' model class shows; may be slow."""

    def named(self, naming: Naming) -> Base:
        """Return this base under the names of `naming`, without the layers that have no name in it."""
        others = {own: name for name, own in naming.modules.items()}
        layers = {
            others[name]: replace(layer, name=others[layer.name], aliases=())
            for name, layer in self.layers.items()
            if name in others and layer.name in others
        }
        tensors = {name: self.tensors[own] for name, own in naming.tensors.items()}
        return replace(
            self, layers=layers, tensors=tensors, architecture=lambda: known.named(others) if (known := self.architecture()) else None
        )


def base_of_checkpoint(checkpoint: Checkpoint, kinds: Mapping[str, str] | None = None) -> Base:
    layers = by_name(layers_of_checkpoint(checkpoint, kinds))
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    shapes |= {f"{layer.name}.weight": layer.shape for layer in layers.values() if layer.weight_of}
    return Base(
        str(checkpoint.root),
        layers,
        shapes,
        lambda name: fingerprint.of_file(checkpoint, layers[name].weight_name),
        is_module=False,
        namings=lambda: transformers_names.of_checkpoint(checkpoint.config, shapes),
        architecture=cache(lambda: transformers_names.architecture(checkpoint.config, shapes)),
    )


def base_of_module(model: nn.Module) -> Base:
    from torchgraft.layers.of_module import layers_of_module, own_shapes

    layers = by_name(layers_of_module(model, registry().kinds()))

    def sample(name: str) -> str:
        return fingerprint_of(site_of(layers[name], model.get_submodule(name)))

    shapes = own_shapes(model)
    return Base(type(model).__name__, layers, shapes, sample, is_module=True, namings=lambda: transformers_names.of_module(model, shapes))


def layer_of(tensor: str, layers: Mapping[str, Layer]) -> str:
    """Return the name of the layer that an adapter's tensor belongs to, or ""."""
    owner = owner_of(tensor, layers)
    return layers[owner].name if owner else ""


def base_of_record(files: AdapterFiles) -> Base:
    """Return the base as far as torchgraft's record describes it.

    Raises:
        FileFormatError: PEFT wrote the adapter, so it has no record.
    """
    if files.record is None:
        raise FileFormatError(
            f"{files.directory}: PEFT wrote this adapter, which does not record the layers' kinds and shapes; give its base: --base MODEL"
        )
    layers = {
        name: Layer(name, site.kind, site.shape, site.dtype, 0, 0, site.bias or False, site.groups)
        for name, site in files.recorded_sites.items()
    }
    also_train = files.record.also_train
    shapes = {name.removeprefix(files.prefix): shape for name, (_, shape) in files.shapes.items()}
    return Base(
        str(files.directory),
        layers,
        {name: shape for name, shape in shapes.items() if is_inside(name, also_train)},
        lambda _: "",
        is_module=False,
    )
