"""What pairing works with: the base as far as it is looked at, and what came of matching an adapter with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torchgraft import peft_names, renames
from torchgraft.adapter_files import AdapterFiles
from torchgraft.checkpoint import fingerprint
from torchgraft.checkpoint.reading import Checkpoint
from torchgraft.errors import PairingError
from torchgraft.kinds.kind import Shape
from torchgraft.layers.layer import Layer, by_name
from torchgraft.layers.of_checkpoint import layers_of_checkpoint
from torchgraft.layers.plan import site_of
from torchgraft.method.config import Config
from torchgraft.method.method import Method
from torchgraft.method.site import Site, fingerprint_of
from torchgraft.naming import Naming, described, owner_of
from torchgraft.plugin.info import DISTRIBUTION
from torchgraft.plugin.registry import registry

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
    namings: Callable[[], Iterable[Naming]] = list
    """What transformers calls the tensors elsewhere; it may be slow, or raise PairingError."""

    def named(self, naming: Naming) -> Base:
        """This base with the names of `naming`, which may leave layers out."""
        others = {own: name for name, own in naming.modules.items()}
        layers = {
            others[name]: replace(layer, name=others[layer.name], aliases=())
            for name, layer in self.layers.items()
            if name in others and layer.name in others
        }
        return replace(self, layers=layers, tensors={name: self.tensors[own] for name, own in naming.tensors.items()})


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
    unused: list[str] = field(default_factory=list)
    """The tensors in the adapter's file that have no place in the base."""
    renamed: dict[str, str] = field(default_factory=dict)
    """The adapter's name of a site or a module → the base's, where they differ."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """The same for every module of the base."""

    @property
    def tensor_names(self) -> dict[str, str]:
        """What the adapter calls the base's tensors that it changes → the base's names; empty if the names are the same."""
        prefix = peft_names.PREFIX if self.files.peft else ""
        names = {f"{paired.own_name}.weight": f"{paired.site.name}.weight" for paired in self.sites}
        names |= {saved.removeprefix(prefix): own for own, saved in self.trained.items()}
        return names if any(name != own for name, own in names.items()) else {}

    @property
    def caveat(self) -> str:
        """What cannot be told of an adapter: of one that PEFT wrote, or that another version of a plugin made; or ""."""
        if self.files.native:
            return self.other_plugin
        named = self.files.peft.get("base_model_name_or_path")
        return (
            f"{self.files.directory}: PEFT records names and shapes, and nothing of the weights: whether this is its base"
            f"{f' ({named})' if named else ''}, and whether that was quantized in training, cannot be told"
        )

    @property
    def other_plugin(self) -> str:
        """Which other plugin, or version of it, the adapter was made with; or "". The bundled ones read what earlier ones wrote."""
        recorded, info = self.files.native.get("method", {}), registry().info(self.method.name)
        made = (recorded.get("distribution", ""), recorded.get("version", ""))
        if made == (info.distribution, info.version) or made[0] == info.distribution == DISTRIBUTION or not made[0]:
            return ""
        return (
            f"{self.files.directory}: it was made with {' '.join(made)}, and {info.distribution} {info.version} is installed: "
            f"whether that {self.method.name} computes the same cannot be told"
        )

    @property
    def note(self) -> str:
        """What was made of names that differ, in one line; or ""."""
        return described(self.renamed)

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
    layers = by_name(layers_of_checkpoint(checkpoint, kinds))
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    shapes |= {f"{layer.name}.weight": layer.shape for layer in layers.values() if layer.weight_of}
    return Base(
        str(checkpoint.root),
        layers,
        shapes,
        lambda name: fingerprint.of_file(checkpoint, layers[name].weight_name),
        is_module=False,
        namings=lambda: renames.of_checkpoint(checkpoint.config, shapes),
    )


def base_of_module(model: nn.Module) -> Base:
    from torchgraft.layers.of_module import layers_of_module, own_shapes

    layers = by_name(layers_of_module(model, registry().kinds()))

    def sample(name: str) -> str:
        return fingerprint_of(site_of(layers[name], model.get_submodule(name)))

    shapes = own_shapes(model)
    return Base(type(model).__name__, layers, shapes, sample, is_module=True, namings=lambda: renames.of_module(model, shapes))


def layer_of(tensor: str, layers: Mapping[str, Layer]) -> str:
    """The name of the layer that an adapter's tensor belongs to, or ""."""
    owner = owner_of(tensor, layers)
    return layers[owner].name if owner else ""
