"""Attaching to a layer: the class of the module object is replaced by a subclass of it.

The object, its name, its parameters and `isinstance` stay as they were. The adapters are children of the module, under
`adapters`, so `state_dict`, `.to()`, FSDP and `deepcopy` find them. torch's FSDP2 swaps classes in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, cast

from torch import nn

from torchgraft.errors import AttachError
from torchgraft.in_memory.parts import Form, Part, Router, container_of, parts_of
from torchgraft.kinds.kind import CARRIER, CHILD, bound_forwards


class Grafted(nn.Module):
    """Base class mixed into the class of a module that carries adapters."""

    _graft_routes: Router | None = None
    """Set within a block of `per_sample`."""
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
        # The class was created here and cannot be imported by name, so _rebuild creates it from the original class.
        _, arguments, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if rest and isinstance(rest[0], dict):  # a copy is not in the block of per_sample that the original is in
            rest[0] = {key: value for key, value in rest[0].items() if key != "_graft_routes"}
        return (_rebuild, (base_class(self), *arguments[1:]), *rest)


setattr(Grafted, CARRIER, True)

_classes: dict[type, type[nn.Module]] = {}


def _grafted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the grafted class of `base`, the same one each time, so that modules of one class stay of one class."""
    if base not in _classes:
        _classes[base] = type(f"Grafted{base.__name__}", (Grafted, base), {"__module__": base.__module__})
    return _classes[base]


def _rebuild(base: type[nn.Module], *arguments: Any) -> nn.Module:
    cls = _grafted_class(base)
    return cls.__new__(cls, *arguments)


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that `module` had before anything was attached."""
    cls = type(module)
    return cls.__mro__[2] if isinstance(module, Grafted) else cls


def attach(module: nn.Module, name: str, part: Part, *, needs_hook: bool = False) -> None:
    """Attach `part` to `module` under the adapter's name. It runs after the parts that are on the module already.

    Args:
        needs_hook: add a no-op hook, for a module that `fast_paths.modules_in_fused_layers` found.
    """
    if not isinstance(module, Grafted):
        _change_class(module, _grafted_class(type(module)))
        module.add_module(CHILD, nn.ModuleDict())
        if needs_hook:
            module.__dict__["_graft_hook"] = module.register_forward_pre_hook(_no_change)
    part.train(module.training)
    container_of(module)[name] = part


def detach(module: nn.Module, name: str) -> None:
    """Remove the adapter's part; with the last part, restore the module's class."""
    del container_of(module)[name]
    if not container_of(module):
        del module._modules[CHILD]
        if "_graft_hook" in module.__dict__:
            module.__dict__.pop("_graft_hook").remove()
        _change_class(module, base_class(module))


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of the module, and the bound forwards that a hook of accelerate calls or leaves."""
    forwards = bound_forwards(module)
    module.__class__ = cls
    module.__dict__.update({key: MethodType(cls.forward, module) for key in forwards})


def check_can_detach(name: str, module: nn.Module) -> None:
    """Check that the module's class is the one that `attach` gave it.

    Raises:
        AttachError: it was replaced later, as torch.nn.utils.parametrize does.
    """
    if isinstance(module, Grafted) and type(module).__mro__[1] is not Grafted:
        raise AttachError(
            f"{name}: its class was changed after the adapter was attached, to {type(module).__name__}; undo that first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )


def check_no_routes(model: nn.Module, what: str) -> None:
    """Check that no block of `per_sample` is active: within it, adapters and weights must stay as they were when it began.

    Args:
        what: the refused operation, for the message: "merged".

    Raises:
        AttachError: the model is in such a block.
    """
    if any(isinstance(module, Grafted) and module._graft_routes is not None for module in model.modules()):
        raise AttachError(f"within per_sample no adapter can be {what}; leave the block first")


def form_of(module: nn.Module) -> Form:
    """Return the class and content of `module`, without its hooks and adapters."""
    members = {key: value for key, value in module.__dict__.items() if key not in _MODULE_MEMBERS}
    return Form(base_class(module), members, dict(module._parameters), dict(module._buffers))


def become(module: nn.Module, form: Form) -> None:
    """Replace the class and content of `module`. It stays the same object, with its hooks and adapters."""
    for key in form_of(module).members:
        del module.__dict__[key]
    module.__dict__.update(form.members)
    for own, new in ((module._parameters, form.parameters), (module._buffers, form.buffers)):
        own.clear()
        own.update(new)  # type: ignore[arg-type]
    module.__class__ = _grafted_class(form.cls) if isinstance(module, Grafted) else form.cls


_MODULE_MEMBERS = frozenset(nn.Module().__dict__) | {"_graft_hook", "_graft_routes"}
"""Plain attributes that every module has, and torchgraft's own: no part of a `Form`."""


def strip(module: nn.Module) -> None:
    """Remove every adapter from `module` and its submodules."""
    for child in list(module.modules()):
        if isinstance(child, Grafted):
            for name in list(container_of(child)):
                detach(child, name)


def check_can_attach(name: str, layer: str, module: nn.Module) -> None:
    """Check that an adapter called `name` can be attached to the module.

    Raises:
        AttachError: the module carries an adapter of this name, has a member called "adapters", or its class cannot be subclassed.
    """
    if isinstance(module, Grafted):
        if name in container_of(module):
            raise AttachError(f"{layer}: there is an adapter {name!r} on it; detach it, or choose another name=…")
        return
    if hasattr(module, CHILD):
        raise AttachError(f"{layer}: its class has a member called {CHILD!r}, where torchgraft stores adapters; exclude this layer")
    try:
        _grafted_class(type(module))
    except TypeError as error:
        raise AttachError(f"{layer}: a {type(module).__name__} cannot have a subclass, so it cannot carry adapters: {error}") from None


def is_adapter_name(name: str) -> bool:
    """Whether torch accepts `name` as the name of a child: no dot, not empty, no member of nn.ModuleDict."""
    return bool(name) and "." not in name and not hasattr(nn.ModuleDict, name) and name not in nn.ModuleDict().__dict__


def _no_change(module: nn.Module, args: Any) -> None:
    """No-op hook: its presence disables the fused encoder path."""
