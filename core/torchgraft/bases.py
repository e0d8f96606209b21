"""What pairing works with: the base as far as it is looked at, and what came of matching an adapter with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchgraft import fingerprint
from torchgraft.adapter_files import AdapterFiles
from torchgraft.checkpoint import Checkpoint
from torchgraft.checkpoint_layers import layers_of_checkpoint
from torchgraft.config import Config
from torchgraft.errors import PairingError
from torchgraft.kinds import Shape
from torchgraft.layers import Layer, by_name
from torchgraft.manager import registry
from torchgraft.method import Method
from torchgraft.planning import site_of
from torchgraft.site import Site

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Base:
    """A model or a checkpoint, as far as pairing looks at it."""

    label: str
    layers: Mapping[str, Layer]
    tensors: Mapping[str, Shape]
    fingerprint: Callable[[str], str]
    """Of the layer's weight."""
    is_module: bool


@dataclass(frozen=True)
class PairedSite:
    site: Site
    config: Config
    own_name: str
    """What the adapter calls the site."""
    tensors: dict[str, str] = field(default_factory=dict)
    """The method's (or PEFT's) name of each tensor → its name in the file."""


@dataclass
class Pairing:
    files: AdapterFiles
    method: Method
    config: Config
    sites: list[PairedSite] = field(default_factory=list)
    also_train: tuple[str, ...] = ()
    trained: dict[str, str] = field(default_factory=dict)
    """The base's tensor that is replaced whole → the name in the adapter's file."""
    problems: list[str] = field(default_factory=list)

    def demand(self, base: Base) -> Pairing:
        """
        Raises:
            PairingError: there are problems.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 1} more: 'adapt check' lists them)" if len(self.problems) > 1 else ""
            raise PairingError(f"{self.files.directory} does not fit {base.label}: {self.problems[0]}{more}", tuple(self.problems))
        return self


def base_of_checkpoint(checkpoint: Checkpoint, kinds: Mapping[str, str] | None = None) -> Base:
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    layers = by_name(layers_of_checkpoint(checkpoint, kinds))
    return Base(str(checkpoint.root), layers, shapes, lambda name: fingerprint.of_file(checkpoint, f"{name}.weight"), is_module=False)


def base_of_module(model: nn.Module) -> Base:
    from torchgraft.module_layers import layers_of_module, own_shapes

    layers = by_name(layers_of_module(model, registry().kinds()))

    def sample(name: str) -> str:
        return fingerprint.of_site(site_of(layers[name], model.get_submodule(name)))

    return Base(type(model).__name__, layers, own_shapes(model), sample, is_module=True)


def owner_of(tensor: str, layers: Mapping[str, Layer]) -> str:
    """The layer whose name the tensor's begins with; the longest such, or ""."""
    segments = tensor.split(".")
    names = (".".join(segments[:end]) for end in range(len(segments) - 1, 0, -1))
    return next((layers[name].name for name in names if name in layers), "")
