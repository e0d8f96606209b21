"""Estimate the memory of training from shapes alone: weights, gradients and optimizer state, without activations."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torchgraft.dtypes import BITS, SIZES
from torchgraft.errors import TorchgraftError, TorchgraftWarning
from torchgraft.layers.layer import Layer, is_inside
from torchgraft.layers.plan import Plan, site_of
from torchgraft.method.config import Config
from torchgraft.plugin.method_hooks import MethodHooks
from torchgraft.plugin.registry import registry

MOMENTS = 2
"""Moments that Adam stores for each trained parameter, in the parameter's dtype."""


@dataclass(frozen=True)
class Memory:
    """Memory of training, in bytes."""

    trainable: int
    """Number of trained parameters (not bytes)."""
    weights: int
    """Bytes of the model's weights as the method stores them."""
    adapter: int
    gradients: int
    optimizer: int
    """Bytes of Adam's two moments for each trained parameter."""

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer


def full_memory(plan: Plan) -> Memory:
    """Estimate training every weight of the model in its stored dtype."""
    weights = sum(layer.bytes for layer in plan.layers)
    return Memory(plan.total_params, weights, 0, weights, MOMENTS * weights)


def adapter_memory(plan: Plan, hooks: MethodHooks, configs: Mapping[str, Config]) -> Memory:
    """Estimate training an adapter. Fully trained modules are copied and trained, too."""
    inside = frozenset(plan.trained)
    whole = [layer for layer in plan.layers if is_inside(layer.name, inside)]
    copied = sum(layer.bytes for layer in whole)
    weights = sum(_frozen_bytes(layer, configs.get(layer.name)) for layer in plan.layers)
    params, trained, stored = sum(layer.params for layer in whole), copied, copied
    for layer in plan.sites:
        config = configs[layer.name]
        size = SIZES[str(getattr(config, "dtype", "float32"))]
        shapes = hooks.shapes(site_of(layer), config)
        own = sum(prod(shape) for name, shape in shapes.items() if name not in hooks.method.buffers)
        params, trained = params + own, trained + own * size
        stored += sum(map(prod, shapes.values())) * size
    return Memory(params, weights, stored, trained, MOMENTS * trained)


def memory_of_methods(plan: Plan, chosen: MethodHooks, configs: Mapping[str, Config], options: Mapping[str, object]) -> dict[str, Memory]:
    """Estimate every method on the same sites: `chosen` with its own configs, the others with those of `options` that they have.

    A method that does not work on these sites, or needs an option that is not given, is skipped.
    """
    found = {}
    for method in sorted(registry().methods(), key=lambda method: method.name):
        if method.name == chosen.method.name:
            found[method.name] = adapter_memory(plan, chosen, configs)
            continue
        if method.kinds is not None and any(layer.kind not in method.kinds for layer in plan.sites):
            continue
        try:
            config = method.config(**{key: value for key, value in options.items() if key in method.config.model_fields})
            same = dict.fromkeys((site.name for site in plan.sites), config)
            found[method.name] = adapter_memory(plan, registry().hooks(method.name), same)
        except (ValueError, TorchgraftError):
            continue
        except Exception as error:  # noqa: BLE001  (an error in one method must not prevent the others' estimates)
            warnings.warn(f"{method.name} is skipped in the estimates: {type(error).__name__}: {error}", TorchgraftWarning, stacklevel=2)
    return found


def _frozen_bytes(layer: Layer, config: Config | None) -> int:
    bits = config.weight_bits() if config is not None else None
    if bits is None or layer.kind is None or registry().kind(layer.kind).quantized:
        return layer.bytes
    weight = prod(layer.shape)
    return layer.bytes - weight * BITS[layer.dtype] // 8 + round(weight * bits / 8)
