"""Plan which layers a selection gives and what an adapter on them costs, before anything changes."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchgraft.checkpoint.reading import Checkpoint, open_checkpoint
from torchgraft.errors import AttachError, ConfigError, SelectionError, TorchgraftWarning, near
from torchgraft.layers.layer import Layer, is_inside, parent_of
from torchgraft.layers.of_checkpoint import layers_of_checkpoint, module_names
from torchgraft.layers.selection import name_matcher, select
from torchgraft.method.site import Site
from torchgraft.plugin.method_hooks import MethodHooks
from torchgraft.plugin.registry import registry

if TYPE_CHECKING:
    from torch import nn

    from torchgraft.method.config import Config

DEFAULT_TARGETS = ("@linear",)


@dataclass(frozen=True)
class Plan:
    """The layers of a model and those that are selected."""

    layers: tuple[Layer, ...]
    """All layers of the model."""
    sites: tuple[Layer, ...]
    """The selected layers."""
    patterns: dict[str, int]
    """Number of layers that each pattern matches."""
    trained: tuple[str, ...] = ()
    """The fully trained modules (`also_train`)."""

    @property
    def total_params(self) -> int:
        return sum(layer.params for layer in self.layers)

    @property
    def trained_params(self) -> int:
        """Number of parameters of the fully trained modules."""
        trained = frozenset(self.trained)
        return sum(layer.params for layer in self.layers if is_inside(layer.name, trained))


def plan(
    source: nn.Module | Checkpoint | str | Path,
    targets: str | Iterable[str] | None = None,
    layers: str | int | Iterable[int] | None = None,
    *,
    also_train: str | Iterable[str] = (),
    kinds: Mapping[str, str] | None = None,
    allow_unmatched: bool = False,
) -> Plan:
    """Return the sites that `targets` (default: @linear) name in a model or a checkpoint. Nothing is changed or loaded.

    Args:
        layers: keep the sites of these blocks: "0-15,20", or numbers.
        also_train: modules to train fully; layers in them are not sites.
        kinds: pattern → kind, for layers of a checkpoint whose files do not show the kind.
        allow_unmatched: accept patterns that match nothing.

    Raises:
        SelectionError: a pattern is malformed or matches nothing.
        FileFormatError: the checkpoint is missing or broken.
    """
    everything, modules = _contents(source, kinds)
    trained = _trained_modules(also_train, modules)
    patterns = [targets] if isinstance(targets, str) else list(DEFAULT_TARGETS if targets is None else targets)
    whole = frozenset(trained)
    free = [layer for layer in everything if not is_inside(layer.name, whole)]
    selection = select(free, patterns, layers, allow_unmatched=allow_unmatched)
    return Plan(tuple(everything), selection.layers, selection.counts, trained)


def configure(
    sites: Sequence[Layer], hooks: MethodHooks, config: Config, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Config]:
    """Return site → config: `config` with the matching overrides (pattern → options); later ones win.

    Warns once per distinct advice of a config about its sites.

    Raises:
        ConfigError: an override is not a valid option, or a config cannot be used on its site.
        SelectionError: an override matches none of the sites.
        AttachError: the method does not work on a site's kind.
    """
    method = hooks.method
    configs = dict.fromkeys((layer.name for layer in sites), config)
    for pattern, values in (overrides or {}).items():
        if wide := sorted(config.adapter_wide.intersection(values)):
            raise ConfigError(f"option {', '.join(wide)} applies to the whole adapter and cannot be overridden per layer ({pattern!r})")
        for layer in select(sites, [pattern]).layers:
            configs[layer.name] = configs[layer.name].with_(method.name, values)
    advice: dict[str, list[str]] = defaultdict(list)
    for layer in sites:
        if method.kinds is not None and layer.kind not in method.kinds:
            raise AttachError(
                f"{layer.name}: {method.name} does not work on {layer.kind} layers, only on {', '.join(sorted(method.kinds))}"
            )
        advice[configs[layer.name].advise(site_of(layer))].append(layer.name)
    for text, names in advice.items():
        if text:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            warnings.warn(f"{names[0]}{more}: {text}", TorchgraftWarning, stacklevel=2)
    return configs


def trainable_params(plan: Plan, hooks: MethodHooks, configs: Mapping[str, Config]) -> int:
    """Return how many parameters an adapter on this plan trains."""
    return plan.trained_params + sum(site_params(layer, hooks, configs[layer.name]) for layer in plan.sites)


def site_params(layer: Layer, hooks: MethodHooks, config: Config) -> int:
    shapes = hooks.shapes(site_of(layer), config)
    return sum(prod(shape) for name, shape in shapes.items() if name not in hooks.method.buffers)


def site_of(layer: Layer, module: nn.Module | None = None, read: Callable[[], Any] | None = None) -> Site:
    assert layer.kind is not None, f"{layer.name} has no kind and cannot be a site"
    kind = registry().kind(layer.kind)
    return Site(
        name=layer.name,
        kind=kind,
        shape=layer.shape,
        dtype=layer.dtype,
        has_bias=layer.has_bias,
        groups=layer.groups,
        padding_idx=getattr(module, "padding_idx", None),
        quantization=kind.quantization(module) if module is not None else {},
        module=module,
        read=read,
    )


def _contents(source: nn.Module | Checkpoint | str | Path, kinds: Mapping[str, str] | None) -> tuple[list[Layer], list[str]]:
    """Return the layers and the names of all modules."""
    if isinstance(source, str | Path):
        source = open_checkpoint(source)
    if isinstance(source, Checkpoint):
        return layers_of_checkpoint(source, kinds), module_names(source)
    from torchgraft.layers.of_module import layers_of_module, named_base_modules

    return layers_of_module(source, registry().kinds()), [name for name, _ in named_base_modules(source)]


def _trained_modules(patterns: str | Iterable[str], modules: Sequence[str]) -> tuple[str, ...]:
    """Return the outermost modules that the patterns match."""
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = name_matcher(pattern)
        hits = [name for name in modules if name and matches(name)]
        if not hits:
            raise SelectionError(f"also_train: {pattern!r} matches no module{near(pattern, (name.rpartition('.')[2] for name in modules))}")
        found.update(dict.fromkeys(hits))
    return tuple(name for name in found if not is_inside(parent_of(name), found))
