"""Attaching to a layer, by giving the module object a subclass of its own class.

The object, its name, its parameters and `isinstance` stay as they were. The adapters are children of the module, under
`adapters`, so that `state_dict`, `.to()`, FSDP and `deepcopy` find them. torch's FSDP2 swaps classes in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from torchgraft.arithmetic.exact import Correction
from torchgraft.arithmetic.precision import exactly, widened
from torchgraft.errors import AttachError, PluginError
from torchgraft.kinds.kind import CARRIER, CHILD
from torchgraft.method.config import Config
from torchgraft.method.site import Site
from torchgraft.plugin.registry import registry
from torchgraft.plugin.shared_tensors import SharedTensors

if TYPE_CHECKING:
    from torchgraft.per_sample import Routes


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
        return [name for name, part in _container(self.module).items() if part in found] if found else []

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


class Grafted(nn.Module):
    """Mixed into the class of a module that carries adapters."""

    _graft_routes: Routes | None = None
    """Set where each sample of a batch has an adapter of its own."""
    adapters: nn.ModuleDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer: Callable[..., Any] = super().forward
        if self._graft_routes is not None:
            return self._graft_routes.forward(layer, self, *args, **kwargs)
        for part in parts_of(self):
            if part.runs:
                layer = partial(part.adapted, layer)
        return layer(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made here and has no importable name: rebuild it from the one that has.
        _, arguments, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if rest and isinstance(rest[0], dict):  # a copy is not in the block that sends samples their ways
            rest[0] = {key: value for key, value in rest[0].items() if key != "_graft_routes"}
        return (_rebuild, (base_class(self), *arguments[1:]), *rest)


setattr(Grafted, CARRIER, True)

_classes: dict[type, type[nn.Module]] = {}


def _grafted_class(base: type[nn.Module]) -> type[nn.Module]:
    """One class for each base, so that equal modules stay of equal type."""
    if base not in _classes:
        _classes[base] = type(f"Grafted{base.__name__}", (Grafted, base), {"__module__": base.__module__})
    return _classes[base]


def _rebuild(base: type[nn.Module], *arguments: Any) -> nn.Module:
    cls = _grafted_class(base)
    return cls.__new__(cls, *arguments)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` had before anything was attached."""
    cls = type(module)
    return cls.__mro__[2] if isinstance(module, Grafted) else cls


def attach(module: nn.Module, name: str, part: Part, *, needs_hook: bool = False) -> None:
    """Put `part` on `module` under the adapter's name; it runs after those that are there.

    Args:
        needs_hook: add a hook that does nothing, for a module that `fused.modules_in_fused_layers` found.
    """
    if not isinstance(module, Grafted):
        module.__class__ = _grafted_class(type(module))
        module.add_module(CHILD, nn.ModuleDict())
        if needs_hook:
            module.__dict__["_graft_hook"] = module.register_forward_pre_hook(_no_change)
    part.train(module.training)
    _container(module)[name] = part


def detach(module: nn.Module, name: str) -> None:
    """Take the adapter's part off; with the last one, the module gets its own class back."""
    del _container(module)[name]
    if not _container(module):
        del module._modules[CHILD]
        if "_graft_hook" in module.__dict__:
            module.__dict__.pop("_graft_hook").remove()
        module.__class__ = base_class(module)


def check_no_routes(model: nn.Module, what: str) -> None:
    """
    Args:
        what: "merged"

    Raises:
        AttachError: it is in a block of `per_sample`, which knows the adapters and weights that were there when it began, and in
            which none lies beneath another.
    """
    if any(isinstance(module, Grafted) and module._graft_routes is not None for module in model.modules()):
        raise AttachError(f"within per_sample no adapter can be {what}; leave the block first")


def parts_of(module: nn.Module) -> list[Part]:
    """What sits on `module`, in the order in which it was attached."""
    return list(named_parts(module).values())


def named_parts(module: nn.Module) -> dict[str, Part]:
    """By the adapter's name, in the order in which they were attached."""
    return cast(dict[str, Part], _container(module)._modules) if isinstance(module, Grafted) else {}


@dataclass
class Form:
    """What a module is made of, its hooks and adapters aside."""

    cls: type[nn.Module]
    members: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]


def form_of(module: nn.Module) -> Form:
    members = {key: value for key, value in module.__dict__.items() if key not in _MODULE_MEMBERS}
    return Form(base_class(module), members, dict(module._parameters), dict(module._buffers))


def become(module: nn.Module, form: Form) -> None:
    """Give `module` another class and content. It stays the same object, with its hooks and adapters."""
    for key in form_of(module).members:
        del module.__dict__[key]
    module.__dict__.update(form.members)
    for own, new in ((module._parameters, form.parameters), (module._buffers, form.buffers)):
        own.clear()
        own.update(new)  # type: ignore[arg-type]
    module.__class__ = _grafted_class(form.cls) if isinstance(module, Grafted) else form.cls


_MODULE_MEMBERS = frozenset(nn.Module().__dict__) | {"_graft_hook", "_graft_routes"}
"""The plain members that every module has."""


def _container(module: nn.Module) -> nn.ModuleDict:
    return cast(nn.ModuleDict, module._modules[CHILD])


def strip(module: nn.Module) -> None:
    """Take every adapter off `module` and what is in it."""
    for child in list(module.modules()):
        if isinstance(child, Grafted):
            for name in list(_container(child)):
                detach(child, name)


def check_can_attach(name: str, layer: str, module: nn.Module) -> None:
    """
    Raises:
        AttachError: the module carries an adapter of this name, or has a member in the way.
    """
    if isinstance(module, Grafted):
        if name in _container(module):
            raise AttachError(f"{layer}: there is an adapter {name!r} on it; detach it, or choose another name=…")
        return
    if hasattr(module, CHILD):
        raise AttachError(f"{layer}: its class has a member called {CHILD!r}, where adapters would be kept")
    try:
        _grafted_class(type(module))
    except TypeError as error:
        raise AttachError(f"{layer}: a {type(module).__name__} cannot have a subclass, so it cannot carry adapters: {error}") from None


def is_adapter_name(name: str) -> bool:
    """Whether torch takes it as the name of a child: no dot, not empty, no member of nn.ModuleDict."""
    return bool(name) and "." not in name and not hasattr(nn.ModuleDict, name) and name not in nn.ModuleDict().__dict__


def _no_change(module: nn.Module, args: Any) -> None:
    """A forward hook that is there only to be there."""


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
