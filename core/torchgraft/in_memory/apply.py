"""Attaching adapters to a model: `apply` creates a new adapter; `attach` attaches it, or one that `load` read from files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.errors import AttachError, PluginError
from torchgraft.in_memory import fast_paths, graft, record
from torchgraft.in_memory.adapter import Adapter, adapters, parts_by_module, watch_steps
from torchgraft.in_memory.parts import Form, SitePart, Stack, TrainedCopy, parts_of
from torchgraft.kinds.kind import HOOKED, kind_of
from torchgraft.layers.bypassed import bypassed_modules
from torchgraft.layers.layer import Layer, is_inside
from torchgraft.layers.plan import configure, plan, site_of
from torchgraft.method.config import Config, parse_config
from torchgraft.method.site import Site, seed_of
from torchgraft.plugin.registry import registry
from torchgraft.plugin.shared_tensors import make_shared

Make = Callable[[Site], Mapping[str, Tensor]]
"""Function that creates one site's tensors."""


def apply(
    model: nn.Module,
    method: str,
    targets: str | Iterable[str] | None = None,
    layers: str | int | Iterable[int] | None = None,
    *,
    name: str = "default",
    seed: int = 0,
    also_train: str | Iterable[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    allow_unmatched: bool = False,
    **options: Any,
) -> Adapter:
    """Attach a new adapter to `model` in place. The model's own parameters are frozen until the last adapter is detached.

    Args:
        method: the plugin's name, "lora".
        targets: patterns of the selection grammar; by default @linear, every matrix except the output head.
        layers: keep the sites of these blocks: "0-15,20", or integers.
        name: name of this adapter. A model can have several adapters with different names; all are active until switched.
        seed: together with a site's name, determines that site's random values, whatever else is selected.
        also_train: modules to train fully beside the adapter (a new head); they are saved and merged with it.
        overrides: pattern → options for the sites that it matches; later patterns take precedence over earlier ones.
        options: the method's options: rank=16, alpha=32.

    Raises:
        SelectionError, ConfigError, PluginError: a pattern, an option or the method is wrong.
        AttachError: a layer cannot carry the adapter. In every case the model is unchanged.
    """
    hooks = registry().hooks(method)
    config = parse_config(method, hooks.method.config, options)
    chosen = plan(model, targets, layers, also_train=also_train, allow_unmatched=allow_unmatched)
    configs = configure(chosen.sites, hooks, config, overrides)

    def make(site: Site) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_of(seed, site.name))
        with torch.device(home := _home(site)):
            tensors = hooks.init(site, configs[site.name], generator)
        return {key: tensor.to(home) for key, tensor in tensors.items()}

    return attach(Adapter(model, name, method, config, chosen), configs, make)


@dataclass(frozen=True)
class Prepared:
    """Everything that attaching puts on a model, created and checked while neither the model nor the adapter has changed."""

    parts: Mapping[str, SitePart]
    """Site → the adapter's part for it."""
    forms: Mapping[str, Form]
    """Site → the class and content that its module takes on first, for a method with the hook adapter_prepare."""
    copies: Mapping[str, TrainedCopy]
    """Module named by `also_train` → its trained copy."""


def attach(adapter: Adapter, configs: Mapping[str, Config], make: Make) -> Adapter:
    """Put `adapter` on its model, with each site's tensors from `make`. If it raises, model and adapter are unchanged."""
    _commit(adapter, _prepare(adapter, configs, make))
    return adapter


def _prepare(adapter: Adapter, configs: Mapping[str, Config], make: Make) -> Prepared:
    _check_can_start(adapter)
    parts, forms = _site_parts(adapter, configs, make)
    _share(adapter, parts)
    copies = _copies(adapter)
    _check_clashes(adapter, parts, copies)
    return Prepared(parts, forms, copies)


def _commit(adapter: Adapter, prepared: Prepared) -> None:
    model = adapter.model
    adapter.parts.update(prepared.parts)
    adapter.copies.update(prepared.copies)
    for site, form in prepared.forms.items():
        graft.become(model.get_submodule(site), form)
    record.freeze(model)
    in_fused_layers = fast_paths.modules_in_fused_layers(model)
    for module, part in parts_by_module(adapter).values():
        graft.attach(module, adapter.name, part, needs_hook=module in in_fused_layers)
    record.add(model, adapter.name, adapter)
    watch_steps(adapter)


def _check_can_start(adapter: Adapter) -> None:
    name = adapter.name
    if not graft.is_adapter_name(name):
        raise AttachError(f"{name!r} cannot be an adapter's name: torch does not take it as the name of a child; choose another")
    if name in adapters(adapter.model):
        raise AttachError(f"the model has an adapter {name!r}; detach it, or choose another name=…")
    if not adapter.plan.sites:
        raise AttachError("nothing is selected: there would be nothing to train")
    graft.check_no_routes(adapter.model, "attached")


def _site_parts(adapter: Adapter, configs: Mapping[str, Config], make: Make) -> tuple[dict[str, SitePart], dict[str, Form]]:
    parts: dict[str, SitePart] = {}
    forms: dict[str, Form] = {}
    for layer in adapter.plan.sites:
        graft.check_can_attach(adapter.name, layer.name, adapter.model.get_submodule(layer.name))
        parts[layer.name], form = _site_part(adapter, layer, configs[layer.name], make)
        if form is not None:
            forms[layer.name] = form
    return parts, forms


def _copies(adapter: Adapter) -> dict[str, TrainedCopy]:
    """Copy the fully trained modules. A module with two names is copied once."""
    model, copies = adapter.model, dict[str, TrainedCopy]()
    bypassed = bypassed_modules(model)
    names: dict[nn.Module, str] = {}
    for name in _runnable(model, adapter.plan.trained):
        names.setdefault(model.get_submodule(name), name)
    for module, name in names.items():
        graft.check_can_attach(adapter.name, name, module)
        fast_paths.check_forward_runs(name, module, bypassed)
        _check_trainable(name, module)
        copies[name] = TrainedCopy(module, _trainable_copy(module))
    return copies


def _share(adapter: Adapter, parts: Mapping[str, SitePart]) -> None:
    """Set the tensors that the adapter's sites share, for a method with the hook adapter_shared."""
    if not adapter.hooks.has("adapter_shared"):
        return
    shared = make_shared(adapter.hooks, [part.site for part in parts.values()], adapter.config)
    for name, part in parts.items():
        if both := sorted(set(shared) & part.tensors().keys()):
            raise PluginError(f"{name}: {adapter.method} makes {', '.join(both)} by adapter_init and by adapter_shared")
        part.shared = shared


def _check_clashes(adapter: Adapter, parts: Mapping[str, SitePart], copies: Mapping[str, TrainedCopy]) -> None:
    """Refuse to fully train a module that another adapter is attached to or inside of, and to attach to one that another adapter trains.

    The trained copy replaces the module, so the adapter on the original would have no effect.

    Raises:
        AttachError: there is such a module.
    """
    for other in adapters(adapter.model).values():
        for trained, sites in ((other.copies, parts), (copies, other.parts)):
            for name in sites:
                if is_inside(name, trained):
                    raise AttachError(
                        f"{name}: one of {other.name!r} and {adapter.name!r} trains it fully and the other adapts it; do one of the two"
                    )


def _site_part(adapter: Adapter, layer: Layer, config: Config, make: Make) -> tuple[SitePart, Form | None]:
    """Create the part for one site. If the method has adapter_prepare, also return the form that replaces the site's module."""
    module = adapter.model.get_submodule(layer.name)
    site = replace(site_of(layer, module), beneath=Stack(module))
    layer_instead = adapter.hooks.prepare(site, config)
    if layer_instead is not None:
        site = _replaced(layer, module, layer_instead)
    tensors = make(site)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = adapter.hooks.shapes(site, config)
    if shapes != expected:
        raise AttachError(
            f"{layer.name}: the plugin {adapter.method!r} created tensors of shapes {shapes}, but its adapter_shapes returns {expected}"
        )
    weight: Tensor = module.weight  # type: ignore[assignment]
    ordered = {name: tensors[name] for name in expected}  # keep the declared order: optimizer state is matched by parameter order
    moved = ordered if weight.is_meta else {name: tensor.to(weight.device) for name, tensor in ordered.items()}
    part = SitePart(replace(site, module=module), adapter.method, config, moved, adapter.hooks.method.buffers)
    return part, None if layer_instead is None else graft.form_of(layer_instead)


def _replaced(layer: Layer, module: nn.Module, instead: nn.Module) -> Site:
    """Return the site as it will be when `instead` has replaced `module`."""
    if parts_of(module):
        raise AttachError(
            f"{layer.name}: the method replaces the layer, but other adapters depend on its present weight; "
            "detach them, or attach this one first"
        )
    if HOOKED in module.__dict__:
        raise AttachError(f"{layer.name}: the method replaces the layer, and accelerate has put a hook on it; attach the adapter before")
    if layer.tied:
        raise AttachError(
            f"{layer.name}: the method replaces its weight, which is shared with {', '.join(layer.tied)}; exclude one of the layers"
        )
    kind, reason = kind_of(instead, registry().kinds())
    if kind is None:
        raise AttachError(f"{layer.name}: the layer that replaces it cannot be adapted: it {reason or 'has no kind'}")
    return site_of(replace(layer, kind=kind.name), instead)


def _home(site: Site) -> str:
    """Return the device that a site's tensors are created on: meta if the weight is there, else the CPU, for the same values everywhere."""
    return "meta" if site.module.weight.is_meta else "cpu"  # type: ignore[union-attr]


def _runnable(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Replace containers by their children, because the forward of a plain container is never called or only calls the children."""
    found: list[str] = []
    for name in names:
        module = model.get_submodule(name)
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        plain = graft.base_class(module).forward in (nn.Sequential.forward, nn.Module.forward)
        if isinstance(module, containers) and plain and not module._parameters and not module._buffers:
            found += _runnable(model, [f"{name}.{key}" for key, child in module.named_children() if any(True for _ in child.parameters())])
        else:
            found.append(name)
    return found


def _check_trainable(name: str, module: nn.Module) -> None:
    """Check that the module can be trained.

    Raises:
        AttachError: a weight in the module is quantized, and codes have no gradient.
    """
    for child_name, child in module.named_modules():
        kind, _ = kind_of(child, registry().kinds())
        if kind is not None and kind.quantized:
            where = f"{name}.{child_name}" if child_name else name
            raise AttachError(f"{where}: its weight is quantized, so it cannot be trained itself; put an adapter on it instead")


def _trainable_copy(module: nn.Module) -> nn.Module:
    copy = deepcopy(module)
    graft.strip(copy)
    return copy.requires_grad_(True)
