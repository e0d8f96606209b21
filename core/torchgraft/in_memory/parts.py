"""The parts of an adapter. A part is what the adapter adds to one module."""

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

MERGED = "merged_into_the_weight"
"""Entry in the state dict of a merged adapter. Its weights contain the change, so a model that is not merged must not load them."""


class Part(nn.Module):
    """Base class of what one adapter adds to one module."""

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self.undo: Undo | None = None
        """What unmerging needs; None unless this part is merged into the weight."""

    @property
    def runs(self) -> bool:
        """Whether forward runs this part: it is active and not merged."""
        return self.active and self.undo is None

    def adapted(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the output of `layer` with this part applied."""
        return layer(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.undo is not None:
            destination[f"{prefix}{MERGED}"] = torch.tensor(True)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing, unexpected, _ = rest
        was_merged = state.pop(f"{prefix}{MERGED}", None) is not None
        super()._load_from_state_dict(state, prefix, *rest)
        if was_merged != (self.undo is not None):
            (unexpected if was_merged else missing).append(f"{prefix}{MERGED}")


@dataclass(frozen=True)
class Stack:
    """The earlier adapters of `end`: the parts on `module` that run before it, or all that run if `end` is not attached yet."""

    module: nn.Module
    end: Part | None = None

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return the canonical weight with the earlier adapters merged into it."""
        for part in self._parts():
            with exactly(weight):
                weight = part.hooks.merge(part.config, widened(part.params(), weight.dtype, weight.device), weight)
        return weight

    def merged_bias(self, bias: Tensor) -> Tensor:
        """Return the bias with the earlier adapters merged into it."""
        for part in self._parts():
            if part.hooks.merges_bias:
                bias = part.hooks.merge_bias(part.config, part.params(), bias)
        return bias

    def names(self) -> list[str]:
        """Return the names of the earlier adapters, in their order."""
        found = self._parts()
        return [name for name, part in container_of(self.module).items() if part in found] if found else []

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the earlier adapters."""
        return [tensor for part in self._parts() for tensor in part.params().values()]

    def _parts(self) -> list[SitePart]:
        if getattr(self.module, "_graft_routes", None) is not None:
            return []  # within per_sample each sample goes through one adapter only
        before = takewhile(lambda part: part is not self.end, parts_of(self.module))
        return [part for part in before if isinstance(part, SitePart) and part.runs]


class SitePart(Part):
    """A method's tensors for one site."""

    def __init__(self, site: Site, method: str, config: Config, tensors: Mapping[str, Tensor], buffers: frozenset[str]) -> None:
        super().__init__()
        self.site = replace(site, beneath=Stack(site.module, self)) if site.module is not None else site
        self.method = method
        self.config: Any = config
        """The method's options for this site."""
        self.shared: SharedTensors | None = None
        """Tensors that all sites of the adapter share, if the method has such."""
        self.fingerprint = ""
        """Fingerprint of the weight that the part was trained on, as recorded in its file; empty if unknown."""
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
        """Return the site's own parameters and buffers."""
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]  # none is registered as None

    def params(self) -> dict[str, Tensor]:
        """Return the `params` of the hooks: the site's own tensors and those that the adapter's sites share."""
        own = self.tensors()
        return own if self.shared is None else {**own, **self.shared.like(own)}

    def train(self, mode: bool = True) -> SitePart:
        """Set the mode as in torch, and drop cached values that depend on adapters.

        Code that evaluates moving averages of weights assigns them to `parameter.data`, which changes no version counter, and then
        calls eval.
        """
        self.site.forget_adapters()
        return super().train(mode)

    def adapted(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())  # a layer of a known kind takes one input
        return self._forward(self.site, self.config, self.params(), x, layer)

    def __getstate__(self) -> dict[str, Any]:
        # Plugins' functions may be closures, which cannot be pickled or copied: they are looked up again.
        return {key: value for key, value in self.__dict__.items() if key not in ("hooks", "_forward")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._resolve()


class TrainedCopy(Part):
    """The trained copy of a module named by `also_train`. It runs instead of the original, which is unchanged."""

    def __init__(self, original: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self._original = [original]  # in a list, so that torch does not register it as a child
        self.module = module

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def adapted(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def parts_of(module: nn.Module) -> list[Part]:
    """Return the parts on `module`, in the order in which they were attached."""
    return list(named_parts(module).values())


def named_parts(module: nn.Module) -> dict[str, Part]:
    """Return adapter → its part on `module`, in the order in which they were attached."""
    return cast(dict[str, Part], container_of(module)._modules) if carries_adapters(module) else {}


@dataclass
class Form:
    """The class and content of a module, without its hooks and adapters."""

    cls: type[nn.Module]
    members: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]


def container_of(module: nn.Module) -> nn.ModuleDict:
    return cast(nn.ModuleDict, module._modules[CHILD])


@dataclass(frozen=True)
class Undo:
    """What unmerging a part needs, held while the part is merged."""

    depth: int
    """Number of adapters that were merged into the module before."""
    snapshot: dict[str, Tensor]
    """The adapter's own tensors as they were merged."""
    merged: dict[str, str]
    """SHA-256 of each of the module's tensors after the merge."""
    correction: Correction | None = None
    """Difference between the original weight and the result of unmerge arithmetic."""
    original: str = ""
    """SHA-256 of the weight before the merge."""
    needed: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors that the method's hook adapter_undo returned."""
    form: Form | None = None
    """Class and content of a quantized layer before the merge made it dense."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """The replaced tensors: all of a fully trained module's, else the bias if the method changed it."""
    fingerprint: str = ""
    """Fingerprint of the weight before the merge."""


class Router(Protocol):
    """Protocol of the object that sends each sample of a batch through its own adapter (`per_sample`)."""

    def forward(self, layer: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of `module`, whose original forward is `layer`."""
