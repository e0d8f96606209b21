"""Call the hooks of one method through typed functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import pluggy

from torchgraft.errors import PluginError
from torchgraft.kinds.kind import Shape
from torchgraft.method.method import Method

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from torch.optim import Optimizer

    from torchgraft.method.site import Site
    from torchgraft.plugin.hookspecs import AdapterView

FORWARD_ARGUMENTS = ("site", "config", "params", "x", "base")

Forward = Callable[..., "Tensor"]


class MethodHooks:
    """The hooks of one method as plain, typed functions. Observers and wrappers of other plugins run with them."""

    def __init__(self, method: Method, own: Mapping[str, pluggy.HookImpl], caller: Callable[[str], pluggy.HookCaller]) -> None:
        self.method = method
        self._own = own
        self._caller = caller

    def has(self, hook: str) -> bool:
        """Whether the method provides an optional hook."""
        return hook in self._own

    def shapes(self, site: Site, config: Any) -> dict[str, Shape]:
        """Return the shapes of the tensors that `init` creates, from `adapter_shapes` or by running `init` on the meta device."""
        shapes: dict[str, Shape] | None = self._caller("adapter_shapes")(site=site, config=config)
        if shapes is not None:
            return shapes
        import torch

        weight = torch.empty(site.shape, dtype=getattr(torch, site.dtype), device="meta")
        blank = replace(site, module=None, read=lambda: weight)
        return {name: tuple(tensor.shape) for name, tensor in self.init(blank, config, torch.Generator()).items()}

    def prepare(self, site: Site, config: Any) -> nn.Module | None:
        layer: nn.Module | None = self._caller("adapter_prepare")(site=site, config=config)
        return layer

    def to_lora(self, site: Site, config: Any, params: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        scale, factors = self._caller("adapter_to_lora")(site=site, config=config, params=params)
        return scale, factors

    def init(self, site: Site, config: Any, generator: Generator) -> dict[str, Tensor]:
        tensors = self._named("adapter_init", self._caller("adapter_init")(site=site, config=config, generator=generator))
        for name, tensor in tensors.items():
            if name not in self.method.buffers and not tensor.is_floating_point():
                raise PluginError(
                    f"{self.method.name}: adapter_init made {name} of {tensor.dtype}, which cannot be trained: list it in Method.buffers"
                )
        return tensors

    def shared(self, sites: Sequence[Site], config: Any) -> dict[str, Tensor]:
        """Return the tensors that all sites share; empty if the method has no `adapter_shared`."""
        if not self.has("adapter_shared"):
            return {}
        return self._named("adapter_shared", self._caller("adapter_shared")(sites=sites, config=config))

    def _named(self, hook: str, tensors: Any) -> dict[str, Tensor]:
        """Check that `tensors`, returned by `hook`, is a dict of tensors."""
        import torch

        if isinstance(tensors, dict) and all(isinstance(one, torch.Tensor) and "." not in name for name, one in tensors.items()):
            return tensors
        raise PluginError(f"{self.method.name}: {hook} returned {tensors!r:.80}, not a dict of tensors by names without a dot")

    @cached_property
    def forward(self) -> Forward:
        """The plugin's own function, so that pluggy is not in the hot path; through pluggy only if another plugin observes or wraps it."""
        caller, own = self._caller("adapter_forward"), self._own["adapter_forward"]
        if len(caller.get_hookimpls()) > 1:
            return lambda *args: caller(**dict(zip(FORWARD_ARGUMENTS, args, strict=True)))
        function: Forward = cast(Forward, own.function)
        if own.argnames == FORWARD_ARGUMENTS:
            return function
        places = [FORWARD_ARGUMENTS.index(name) for name in own.argnames]
        return lambda *args: function(*(args[place] for place in places))

    @property
    def merges_rows(self) -> bool:
        """Whether merge and unmerge accept blocks of rows."""
        names = ("adapter_merge", "adapter_unmerge", "adapter_undo")
        return all("rows" in self._own[name].argnames for name in names if name in self._own)

    @property
    def merges_weight(self) -> bool:
        """Whether a merge changes weights, and not only biases."""
        return self.has("adapter_merge")

    def merge(self, config: Any, params: Mapping[str, Tensor], weight: Tensor, rows: slice = slice(None)) -> Tensor:
        if not self.merges_weight:
            return weight
        return self._alike(weight, "adapter_merge", config=config, params=params, weight=weight, rows=rows)

    def unmerge(self, config: Any, params: Mapping[str, Tensor], weight: Tensor, rows: slice = slice(None)) -> Tensor:
        if not self.merges_weight:
            return weight
        return self._alike(weight, "adapter_unmerge", config=config, params=params, weight=weight, rows=rows)

    def _alike(self, like: Tensor, hook: str, **arguments: Any) -> Tensor:
        """Call the hook, and check that its result has the shape of `like`, because another shape could be broadcast silently."""
        result: Tensor = self._caller(hook)(**arguments)
        if getattr(result, "shape", None) != like.shape:
            found = f"a tensor of shape {list(result.shape)}" if hasattr(result, "shape") else repr(result)
            raise PluginError(f"{self.method.name}: {hook} returned {found}, where {list(like.shape)} is expected")
        return result

    @property
    def merges_bias(self) -> bool:
        return self.has("adapter_merge_bias")

    def merge_bias(self, config: Any, params: Mapping[str, Tensor], bias: Tensor) -> Tensor:
        return self._alike(bias, "adapter_merge_bias", config=config, params=params, bias=bias)

    def undo(self, config: Any, params: Mapping[str, Tensor], weight: Tensor, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Return what `adapter_unmerge` will need; empty if the method has no `adapter_undo`."""
        tensors: dict[str, Tensor] | None = self._caller("adapter_undo")(config=config, params=params, weight=weight, rows=rows)
        return tensors or {}

    def param_groups(self, adapter: AdapterView, lr: float, weight_decay: float) -> list[dict[str, Any]] | None:
        caller = self._caller("adapter_param_groups")
        groups: list[dict[str, Any]] | None = caller(adapter=adapter, lr=lr, weight_decay=weight_decay)
        return groups

    def penalty(self, site: Site, config: Any, params: Mapping[str, Tensor]) -> Tensor | None:
        penalty: Tensor | None = self._caller("adapter_penalty")(site=site, config=config, params=params)
        return penalty

    def step(self, adapter: AdapterView, optimizer: Optimizer, step: int, metrics: Mapping[str, float]) -> None:
        self._caller("adapter_step")(adapter=adapter, optimizer=optimizer, step=step, metrics=metrics)
