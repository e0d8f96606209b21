"""The parts of an adapter: what it adds to one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from torchgraft.arithmetic.exact import Correction
from torchgraft.arithmetic.precision import exactly, widened
from torchgraft.errors import PluginError
from torchgraft.kinds.kind import CHILD, carries_adapters
from torchgraft.method.config import Config
from torchgraft.method.site import Site
from torchgraft.plugin.registry import registry
from torchgraft.plugin.shared_tensors import SharedTensors


class Part(nn.Module):
    """What one adapter adds to one module."""

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self.undo: Undo | None = None
        """What unmerge needs; there while this part is merged into the weight."""

    @property
    def runs(self) -> bool:
        return self.active and self.undo is None

    def adapted(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The output of `layer` with this part on it."""
        return layer(*args, **kwargs)


@dataclass(frozen=True)
class Stack:
    """The parts on `module` that run before `end`; all that run, if `end` is not on it yet."""

    module: nn.Module
    end: Part | None = None

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        for part in self._parts():
            with exactly(weight):
                weight = part.hooks.merge(part.config, widened(part.params(), weight.dtype, weight.device), weight)
        return weight

    def merged_bias(self, bias: Tensor) -> Tensor:
        for part in self._parts():
            if part.hooks.merges_bias:
                bias = part.hooks.merge_bias(part.config, part.params(), bias)
        return bias

    def names(self) -> list[str]:
        """Of the adapters."""
        found = self._parts()
        return [name for name, part in container_of(self.module).items() if part in found] if found else []

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self._parts() for tensor in part.params().values()]

    def _parts(self) -> list[SitePart]:
        if getattr(self.module, "_graft_routes", None) is not None:
            return []  # each sample goes through one adapter
        before = takewhile(lambda part: part is not self.end, parts_of(self.module))
        return [part for part in before if isinstance(part, SitePart) and part.runs]


class SitePart(Part):
    """A method's tensors for one site."""

    def __init__(self, site: Site, method: str, config: Config, tensors: Mapping[str, Tensor], buffers: frozenset[str]) -> None:
        super().__init__()
        self.site = replace(site, beneath=Stack(site.module, self)) if site.module is not None else site
        self.method = method
        self.config: Any = config
        """The method's own class of config."""
        self.shared: SharedTensors | None = None
        self.fingerprint = ""
        """Of the weight that the part was made for, as its file has it; empty if it is not known."""
        for name, tensor in tensors.items():
            if hasattr(self, name):
                raise PluginError(
                    f"{site.name}: {method} cannot have a tensor called {name!r}: torch or the engine has a member of that name"
                )
            if name in buffers:
                self.register_buffer(name, tensor.detach())
            else:
                self.register_parameter(name, nn.Parameter(tensor.detach()))
        self._resolve()

    def _resolve(self) -> None:
        self.hooks = registry().hooks(self.method)
        self._forward = self.hooks.forward

    def tensors(self) -> dict[str, Tensor]:
        """The site's own."""
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]  # none is registered as None

    def params(self) -> dict[str, Tensor]:
        """What the hooks are given: the site's own tensors, and those that the adapter's sites share."""
        own = self.tensors()
        return own if self.shared is None else {**own, **self.shared.like(own)}

    def train(self, mode: bool = True) -> SitePart:
        """As in torch; and what was kept of the adapters' values is computed anew.

        Moving averages of weights are put in by way of `parameter.data`, which nothing counts, and then eval is called.
        """
        self.site.forget_adapters()
        return super().train(mode)

    def adapted(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())  # a layer of a known kind takes one input
        return self._forward(self.site, self.config, self.params(), x, layer)

    def __getstate__(self) -> dict[str, Any]:
        # Plugins' functions may be closures, which neither pickle nor copy: they are looked up again.
        return {key: value for key, value in self.__dict__.items() if key not in ("hooks", "_forward")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._resolve()


class TrainedCopy(Part):
    """A whole module that is trained (`also_train`): it runs in the place of the original, which stays as it was."""

    def __init__(self, original: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self._original = [original]  # in a list, for it is no child
        self.module = module

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def adapted(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def parts_of(module: nn.Module) -> list[Part]:
    """What sits on `module`, in the order in which it was attached."""
    return list(named_parts(module).values())


def named_parts(module: nn.Module) -> dict[str, Part]:
    """By the adapter's name, in the order in which they were attached."""
    return cast(dict[str, Part], container_of(module)._modules) if carries_adapters(module) else {}


@dataclass
class Form:
    """What a module is made of, its hooks and adapters aside."""

    cls: type[nn.Module]
    members: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]


def container_of(module: nn.Module) -> nn.ModuleDict:
    return cast(nn.ModuleDict, module._modules[CHILD])


@dataclass(frozen=True)
class Undo:
    """What is kept while a part is merged."""

    depth: int
    """How many adapters were merged into the module before."""
    snapshot: dict[str, Tensor]
    """The adapter's own tensors as they were merged."""
    merged: dict[str, str]
    """The digests of the module's tensors after the merge."""
    correction: Correction | None = None
    original: str = ""
    """The digest of the weight before."""
    needed: Mapping[str, Tensor] = field(default_factory=dict)
    """What the method asked for, by its hook adapter_undo."""
    form: Form | None = None
    """Of a quantised layer: what it was before it became a dense one."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """What was replaced: of a module that is trained whole, all; else a bias that was merged into."""
    fingerprint: str = ""
    """Of the weight before the merge."""


class Router(Protocol):
    """Sends each sample of a batch through an adapter of its own (`per_sample`)."""

    def forward(self, layer: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of `module`, whose own forward is `layer`."""
