"""Adapters on a model: training, switching, merging, detaching."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchgraft.adapter_files.writing import Contents, also_saved, write
from torchgraft.errors import AttachError, MergeError, TorchgraftWarning, near
from torchgraft.in_memory import graft, merge, record
from torchgraft.in_memory.optimizers import check_groups, make_optimizer
from torchgraft.in_memory.parts import Part, SitePart, TrainedCopy
from torchgraft.in_memory.places import Step, check_in_place, replaced
from torchgraft.in_memory.resize import check_change, check_resizable, resize_
from torchgraft.in_memory.save import quantized_beside, saved_site
from torchgraft.in_memory.step_watch import StepWatch
from torchgraft.layers.layer import Layer
from torchgraft.layers.of_module import layers_of_module, named_base_modules, own_state, sharing_bias
from torchgraft.layers.plan import Plan
from torchgraft.method.config import Config
from torchgraft.method.resize import Resize
from torchgraft.method.site import Site
from torchgraft.plugin.method_hooks import MethodHooks
from torchgraft.plugin.registry import registry


@dataclass(frozen=True)
class Count:
    """How many parameters an adapter trains, and how many the model has in total, adapters included."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trained parameters in percent of the total."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.percent:.3g} %)"


class Adapter:
    """A named set of sites with one method's parameters. It is trained, saved and merged as a unit. Create it with `apply` or `load`."""

    def __init__(self, model: nn.Module, name: str, method: str, config: Config, base: Plan) -> None:
        self.model = model
        self.name = name
        self.method = method
        self.config: Any = config
        """The method's options, without overrides for single sites."""
        self.plan = base
        self.parts: dict[str, SitePart] = {}
        """Site → what the adapter adds to it."""
        self.copies: dict[str, TrainedCopy] = {}
        """Module named by `also_train` → its trained copy."""
        self.state: dict[str, Any] = {}
        """State of the method between steps: tensors and values that JSON can represent. Saved with the adapter."""
        self.way: tuple[Step, ...] = ()
        """The steps to every part when the model was last run."""
        self._steps = StepWatch()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "way": ()}  # a copy finds its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        watch_steps(self)  # a copied parameter has no hooks

    def __repr__(self) -> str:
        state = " (merged)" if self.merged else "" if self.active else " (not active)"
        return f"<Adapter {self.name!r}: {self.method} on {len(self.parts)} sites{state}>"

    @property
    def sites(self) -> list[Site]:
        """The adapted layers, as the method sees them."""
        return [part.site for part in self.parts.values()]

    @property
    def hooks(self) -> MethodHooks:
        """The hooks of the adapter's method."""
        return registry().hooks(self.method)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the name, "site.tensor", and the parameter for everything that this adapter trains."""
        for site, part in self.parts.items():
            yield from ((f"{site}.{name}", parameter) for name, parameter in part.named_parameters())
        for name, copy in self.copies.items():
            yield from ((f"{name}.{key}", parameter) for key, parameter in copy.module.named_parameters())

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that this adapter trains."""
        return [parameter for _, parameter in self.named_parameters()]

    def count(self) -> Count:
        """Count the trained parameters and those of the whole model."""
        self._check_attached()
        return Count(sum(p.numel() for p in self.parameters()), sum(p.numel() for p in self.model.parameters()))

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return parameter groups for a torch optimizer, with the learning rates that the method sets."""
        self._check_attached()
        groups = self.hooks.param_groups(adapter=self, lr=lr, weight_decay=weight_decay) or []
        groups = [{**group, "params": [p] if isinstance(p := group["params"], Tensor) else list(p)} for group in groups]
        if groups:
            check_groups(groups, dict(self.named_parameters()), self.method)
        return groups or [{"params": self.parameters(), "lr": lr, "weight_decay": weight_decay}]

    def optimizer(self, name: str, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
        """Create an optimizer over `param_groups`: "adamw", or one of bitsandbytes: "paged_adamw_32bit", "adamw_8bit", …

        Raises:
            ConfigError: there is no such optimizer, or the parameters' device has no paging.
        """
        return make_optimizer(name, self.param_groups(lr, weight_decay), lr, **options)

    def penalty(self) -> Tensor:
        """Return the sum of the method's terms for the loss; 0 if it has none."""
        terms = [part.hooks.penalty(part.site, part.config, part.params()) for part in self.parts.values()]
        return sum((term for term in terms if term is not None), start=torch.zeros(()))

    def step(self, optimizer: Optimizer, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Run the method's own step. Call it after each `optimizer.step()`, before `zero_grad()`; many methods do nothing here.

        Args:
            step: the number of this step, from 1.
            metrics: measured values that the method may use: {"val_loss": 0.3}.

        Raises:
            MergeError: the adapter is merged.
            AttachError: the adapter was detached, the optimizer does not train it, or its moments cannot follow a change of shape.
        """
        self._check_attached()
        self._check_unmerged()
        if not self.hooks.has("adapter_step"):
            return
        check_resizable(optimizer, self._site_parameters())
        self._steps.stepped = True
        self.hooks.step(adapter=self, optimizer=optimizer, step=step, metrics=metrics or {})

    def resize(self, sites: Mapping[str, Resize], optimizer: Optimizer) -> None:
        """Replace sites' tensors by tensors of other shapes and convert the optimizer's moments, for methods that change ranks.

        The parameters stay the same objects, so optimizers and schedules continue with them.
        """
        self._check_unmerged()
        check_resizable(optimizer, self._site_parameters())
        for name, change in sites.items():
            check_change(name, self.parts[name], change)
        if sites and torch.distributed.is_available() and torch.distributed.is_initialized():
            text = "ranks changed: DistributedDataParallel no longer averages these gradients; wrap the model in it again"
            warnings.warn(text, TorchgraftWarning, stacklevel=4)
        for name, change in sites.items():
            part = self.parts[name]
            for key, value in change.tensors.items():
                resize_(part._parameters[key], value, optimizer, change.carry[key])  # type: ignore[arg-type]
            part.config = change.config
            part.site.memo.clear()

    def _check_unmerged(self) -> None:
        if self.merged:
            raise MergeError(f"the adapter {self.name!r} is merged into the weights, so it must not change; unmerge it first")

    def _site_parameters(self) -> list[nn.Parameter]:
        """Parameters that may be resized. Those of fully trained modules keep their shapes."""
        return [parameter for part in self.parts.values() for parameter in part.parameters()]

    @property
    def active(self) -> bool:
        """Whether the adapter takes part in forward."""
        return all(part.active for part in self._all_parts())

    @active.setter
    def active(self, value: bool) -> None:
        check_switchable(self)
        for part in self._all_parts():
            part.active = value

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Bypass this adapter within the block, then restore its previous state."""
        before = self.active
        self.active = False
        try:
            yield
        finally:
            for part in self._all_parts():  # not by the property, which refuses if it was merged within the block
                part.active = before

    @property
    def merged(self) -> bool:
        """Whether the adapter is merged into the base weights."""
        return any(part.undo is not None for part in self._all_parts())

    def merge(self) -> None:
        """Write the adapter into the base weights: float64 arithmetic, rounded at the end. If it raises, nothing has changed.

        Raises:
            MergeError: the adapter is merged already, a weight is shared with another layer or has no values, or the
                result would not be finite.
            AttachError: the adapter was detached, or the call is within a block of `per_sample`.
        """
        self._check_attached()
        graft.check_no_routes(self.model, "merged")
        self._steps.check(self.name, self.method)
        tied = {layer.name: layer.tied for layer in self._layers()}
        merge.merge_parts(self.name, parts_by_module(self), tied, sharing_bias(self.model) if self.hooks.merges_bias else {})

    def unmerge(self, *, discard_edits: bool = False) -> None:
        """Restore the base weights to the last bit. If it raises, nothing has changed.

        Args:
            discard_edits: if the adapter's tensors were changed while merged, reset them to the values that were merged.

        Raises:
            MergeError: the adapter is not merged, another adapter was merged after it, or the adapter or the weights
                changed after the merge.
            AttachError: the adapter was detached, or the call is within a block of `per_sample`.
        """
        self._check_attached()
        graft.check_no_routes(self.model, "unmerged")
        merge.unmerge_parts(self.name, parts_by_module(self), discard_edits)

    def detach(self, *, keep_merged: bool = False) -> None:
        """Remove the adapter from the model, unmerging it first. After the last adapter the model is as it was before `apply`.

        Args:
            keep_merged: leave a merged adapter's changes in the weights permanently.

        Raises:
            MergeError: the adapter cannot be unmerged (see `unmerge`), or `keep_merged` is given and it is not merged.
            AttachError: the adapter was detached already, a layer's class was changed since, or the call is within a block of `per_sample`.
        """
        self._check_recorded()
        graft.check_no_routes(self.model, "detached")
        if keep_merged and not self.merged:
            raise MergeError(f"the adapter {self.name!r} is not merged, so there is nothing to keep; call merge() first")
        gone = replaced(self.model, self.name, (*self.parts, *self.copies))
        left = parts_by_module(self, without=gone)
        for name, (module, _) in left.items():
            graft.check_can_detach(name, module)
        if self.merged and not keep_merged:
            self.unmerge()
        if gone:
            text = f"detached from the layers that are left; {', '.join(gone[:3])}{'…' if gone[3:] else ''} had been replaced"
            warnings.warn(f"the adapter {self.name!r} is {text}", TorchgraftWarning, stacklevel=2)
        for module, part in left.values():
            graft.detach(module, self.name)
            if part.undo is not None:
                merge.forget(module, part.undo)
                part.undo = None
        record.remove(self.model, self.name)

    def save(self, directory: str | PathLike[str]) -> None:
        """Write torchgraft.json and adapter_model.safetensors, and adapter_config.json if PEFT has the method, into `directory`.

        Raises:
            AttachError: the adapter was detached, has no values (meta device), or the call is within a block of `per_sample`.
        """
        self._check_attached()
        graft.check_no_routes(self.model, "saved")
        self._steps.check(self.name, self.method)
        if any(parameter.is_meta for parameter in self.parameters()):
            raise AttachError(f"the adapter {self.name!r} is on the meta device and has no values to save")
        modules = [name for name, _ in named_base_modules(self.model)]
        trained = self.plan.trained
        contents = Contents(
            method=registry().method(self.method),
            config=self.config,
            sites=[saved_site(part) for part in self.parts.values()],
            trained={name: copy.module.state_dict() for name, copy in self.copies.items()},
            also_train=trained,
            also_saved={name: own_state(self.model.get_submodule(name)) for name in also_saved(trained, modules)},
            modules=modules,
            base=getattr(getattr(self.model, "config", None), "_name_or_path", None) or None,
            state=self.state,
            shared=next((part.shared.digests() for part in self.parts.values() if part.shared is not None), {}),
            quantized=quantized_beside(self.model, self.parts),
        )
        write(contents, Path(directory))

    def _check_attached(self) -> None:
        """Check that the adapter is on its model, and every layer that it was attached to.

        Raises:
            AttachError: it was detached, or a layer was replaced.
        """
        self._check_recorded()
        check_in_place(self.model, self.name, (*self.parts, *self.copies))

    def _check_recorded(self) -> None:
        if adapters(self.model).get(self.name) is not self:
            raise AttachError(f"the adapter {self.name!r} was detached from its model; apply or load it again")

    def _all_parts(self) -> list[Part]:
        return [*self.parts.values(), *self.copies.values()]

    def _layers(self) -> list[Layer]:
        return layers_of_module(self.model, registry().kinds())


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters on `model` by name. A model from `deepcopy` or `pickle` has its own copies of them."""
    return record.adapters_on(model)


def activate(model: nn.Module, *names: str) -> None:
    """Activate the adapters called `names` and deactivate all others.

    Raises:
        AttachError: the model has no adapter of that name.
        MergeError: an adapter that would be switched is merged.
    """
    found = adapters(model)
    for name in names:
        if name not in found:
            raise AttachError(f"the model has no adapter {name!r}{near(name, found)}; it has {', '.join(found) or 'none'}")
    switched = {name: adapter for name, adapter in found.items() if adapter.active != (name in names)}
    for adapter in switched.values():
        check_switchable(adapter)
    for name, adapter in switched.items():
        adapter.active = name in names


def check_switchable(adapter: Adapter) -> None:
    """Check that the adapter can be activated and deactivated.

    Raises:
        AttachError: the adapter was detached.
        MergeError: the adapter is merged, so forward cannot bypass it; or a later one is merged and depends on it.
    """
    adapter._check_attached()
    if adapter.merged:
        raise MergeError(f"the adapter {adapter.name!r} is merged into the weights and cannot be switched; unmerge it first")
    merge.check_switchable(adapter.name, parts_by_module(adapter))


def parts_by_module(adapter: Adapter, without: Container[str] = ()) -> dict[str, tuple[nn.Module, Part]]:
    """Return the name of each adapted module → the module and the adapter's part on it, `without` some names."""
    parts: dict[str, Part] = {**adapter.parts, **adapter.copies}
    return {name: (adapter.model.get_submodule(name), part) for name, part in parts.items() if name not in without}


def watch_steps(adapter: Adapter) -> None:
    """Count the backward passes of a method that needs `Adapter.step`, to warn if it is trained without that."""
    if adapter.hooks.has("adapter_step"):
        adapter._steps.count_backwards(adapter.parameters())
