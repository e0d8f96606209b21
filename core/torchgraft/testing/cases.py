"""The cases that checks run on: small layers of every kind that the method claims, in several dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from torchgraft.errors import ConfigError, TorchgraftError, TorchgraftWarning, near
from torchgraft.in_memory.adapter import Adapter
from torchgraft.in_memory.apply import apply
from torchgraft.in_memory.parts import SitePart
from torchgraft.kinds.kind import Kind, kind_of
from torchgraft.layers.plan import plan, site_of
from torchgraft.method.config import Config, parse_config
from torchgraft.method.site import Site
from torchgraft.plugin.method_hooks import MethodHooks
from torchgraft.plugin.registry import registry
from torchgraft.testing.compare import SkippedError

LAYER = "layer"
Layers = Literal["all", "dense", "quantized"]


class Model(nn.Module):
    """A model of one layer, called "layer"."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x))


@dataclass(frozen=True)
class Case:
    """One layer in one dtype, for one method. `str` describes it."""

    name: str
    """Name of the method."""
    options: Mapping[str, Any]
    kind: Kind
    example: nn.Module
    input: Tensor
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.example!r}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def hooks(self) -> MethodHooks:
        return registry().hooks(self.name)

    @property
    def x(self) -> Tensor:
        """A new input, in the case's dtype unless it is indices."""
        return self.input.to(self.dtype, copy=True) if self.input.is_floating_point() else self.input.clone()

    def untouched(self) -> Model:
        """Return a model of the original layer, in eval mode."""
        layer = deepcopy(self.example)
        return Model(layer if self.kind.quantized else layer.to(self.dtype)).eval()

    def base(self) -> Model:
        """Return the model to compare an adapter with: `untouched`, with the layer that the method's `adapter_prepare` returns, if any."""
        model = self.untouched()
        if self.hooks.has("adapter_prepare"):
            self.attach(model).detach()
        with torch.no_grad():
            model(self.x)  # bitsandbytes gives a bias its dtype in the first forward, and may repack the weight
        return model

    def config(self, site: Site, **options: Any) -> Config:
        """Return the method's config with the case's options.

        Raises:
            SkippedError: the method refuses these options, or this site.
        """
        try:
            config = parse_config(self.name, self.hooks.method.config, {**self.options, **options})
            config.advise(site)
        except ConfigError as error:
            raise SkippedError(f"refused by the method: {error}") from None
        return config

    def site(self, model: nn.Module, name: str = LAYER) -> Site:
        """Return the site of a layer without an adapter."""
        (layer,) = plan(model, [name]).sites
        return site_of(layer, model.get_submodule(name))

    def attach(
        self, model: nn.Module, name: str = "default", seed: int = 0, *, targets: Sequence[str] = (LAYER,), **options: Any
    ) -> Adapter:
        """Attach a new adapter to the model's layers.

        Raises:
            SkippedError: the method refuses these options or this site, or cannot prepare the layer.
        """
        try:
            site = self.site(model, targets[0])
            self.hooks.prepare(site, self.config(site, **options))
        except TorchgraftError as error:
            raise SkippedError(f"refused by the method: {error}") from None
        try:
            return apply(model, self.name, list(targets), name=name, seed=seed, **{**self.options, **options})
        except ConfigError as error:
            raise SkippedError(f"refused by the method: {error}") from None

    def adapted(self, *, perturb: bool = True, **options: Any) -> tuple[Model, Adapter]:
        """Return a model with an adapter; its parameters are perturbed away from their initial values unless `perturb` is False."""
        model = self.base()
        adapter = self.attach(model, **options)
        if perturb:
            perturb_(adapter)
        return model, adapter

    @cached_property
    def eps(self) -> float:
        """The largest machine epsilon among the layer's dtype, its compute dtype if it is quantized, and the adapter's dtype."""
        options = parse_config(self.name, self.hooks.method.config, self.options)
        found = [torch.finfo(self.dtype).eps, torch.finfo(getattr(torch, getattr(options, "dtype", "float32"))).eps]
        quantization = self.site(self.base()).quantization
        if compute := quantization.get("compute_dtype"):
            found.append(torch.finfo(getattr(torch, compute)).eps)
        if quantization.get("type") == "int8":
            found.append(1 / 127)  # inputs are rounded to 8 bits, too
        return max(found)


@dataclass(frozen=True)
class Subject:
    """The method under test."""

    name: str
    options: Mapping[str, Any]

    @cached_property
    def examples(self) -> list[tuple[Kind, list[tuple[nn.Module, Tensor]]]]:
        """Each claimed kind with its example layers and inputs, without kinds that have none."""
        return [(kind, found) for kind, found, _ in self._tried if found]

    @cached_property
    def missing(self) -> dict[str, str]:
        """Kind → why no check runs on it."""
        claimed = registry().method(self.name).kinds or frozenset()
        known = {kind.name for kind in registry().kinds()}
        unknown = {name: f"there is no such kind{near(name, known)}" for name in sorted(claimed - known)}
        return {kind.name: reason for kind, found, reason in self._tried if not found} | unknown

    @cached_property
    def _tried(self) -> list[tuple[Kind, list[tuple[nn.Module, Tensor]], str]]:
        claimed = registry().method(self.name).kinds
        kinds = sorted(registry().kinds(), key=lambda kind: (kind.name != "Linear", kind.quantized))
        with isolated():
            return [(kind, *_examples(kind)) for kind in kinds if claimed is None or kind.name in claimed]


def _examples(kind: Kind) -> tuple[list[tuple[nn.Module, Tensor]], str]:
    """Return the kind's example layers, or none and the reason."""
    try:
        found = kind.examples()
    except ImportError as error:
        return [], f"its class is not installed ({error})"
    except Exception as error:  # noqa: BLE001  (the kind may belong to another plugin, which is not under test)
        return [], f"its examples() failed: {type(error).__name__}: {error}"
    # A subclass of a built-in kind inherits examples of the built-in kind until it defines its own.
    own = [(module, x) for module, x in found if kind_of(module, registry().kinds())[0] is kind]
    return own, "" if own else "it gives no example layers"


def part_of(adapter: Adapter) -> SitePart:
    """Return the adapter's part on the layer."""
    return adapter.parts[LAYER]


@torch.no_grad()
def perturb_(adapter: Adapter, seed: int = 1) -> None:
    """Add noise to every trained parameter: 0.3 times its root mean square, or 0.3 if that is below 0.01."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        size = math.sqrt(float(parameter.double().square().mean())) if parameter.numel() else 0.0
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_((0.3 * (size if size > 0.01 else 1.0) * noise).to(parameter))


def weighted(output: Tensor, seed: int = 2) -> Tensor:
    """Return a loss in which every entry of the output has a different random weight."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (output * weights.to(output.dtype)).sum()


def backward(output: Tensor) -> None:
    torch.autograd.backward(weighted(output))


@contextmanager
def isolated() -> Iterator[None]:
    """Run the block with fixed random seeds and torch's default settings, then restore them."""
    import warnings

    default = torch.get_default_dtype()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("ignore", TorchgraftWarning)  # for example that a rank is above what these small layers can use
        torch.default_generator.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
