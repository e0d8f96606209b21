"""List the layers of an nn.Module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchgraft import dtypes
from torchgraft.errors import SelectionError
from torchgraft.kinds.kind import CHILD, Kind, carries_adapters, kind_of
from torchgraft.layers.bypassed import bypassed_modules
from torchgraft.layers.layer import Layer, is_inside


def layers_of_module(model: nn.Module, kinds: tuple[Kind, ...]) -> list[Layer]:
    """Return every module that owns parameters, in the model's order, without the modules that adapters added."""
    _check_readable(model)
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in named_base_modules(model):
        names[module].append(name)
    bypassed = bypassed_modules(model)
    owners = {module: found for module, found in names.items() if any(p is not None for p in module._parameters.values())}
    tied = _tied(owners)
    counted: set[int] = set()
    return [_layer(module, found, tied.get(module, ()), kinds, bypassed.get(module, ""), counted) for module, found in owners.items()]


def _check_readable(model: nn.Module) -> None:
    """Check that the model's layers can be listed.

    Raises:
        SelectionError: it is compiled or scripted as a whole, or has parameters without a shape.
    """
    if type(model).__module__ == "torch._dynamo.eval_frame":  # importing its class would take a second
        raise SelectionError("this is the result of torch.compile; give the module itself, and the compiled one runs with the adapters")
    if isinstance(model, torch.jit.ScriptModule):
        raise SelectionError("a scripted or traced model cannot carry adapters; attach them before torch.jit.script or trace")
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise SelectionError(f"{lazy[0]} has no shape yet (a lazy module); run the model on one batch first")


def named_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate like `named_modules`, but yield every name of a module and skip adapters."""

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield name, module
        for key, child in module._modules.items():
            if child is None or isinstance(child, torch.jit.ScriptModule):  # a scripted module cannot carry adapters
                continue
            if not (key == CHILD and carries_adapters(module)):
                yield from walk(f"{name}.{key}" if name else key, child)

    return walk("", model)


def own_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `own_state` without calling `state_dict`, because bitsandbytes repacks its weights there."""
    shapes = {}
    for name, module in named_base_modules(model):
        saved = {key: buffer for key, buffer in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for key, tensor in {**module._parameters, **saved}.items():
            if tensor is not None:
                shapes[f"{name}.{key}" if name else key] = tuple(tensor.shape)
    return shapes


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's `state_dict` without the tensors that adapters added."""
    added = {f"{name}.{CHILD}" if name else CHILD for name, child in named_base_modules(module) if carries_adapters(child)}
    return {key: tensor for key, tensor in module.state_dict().items() if not is_inside(key, added)}


def _layer(module: nn.Module, names: list[str], tied: tuple[str, ...], kinds: tuple[Kind, ...], bypassed: str, counted: set[int]) -> Layer:
    own = {key: tensor for key, tensor in module._parameters.items() if tensor is not None}
    weight = own.get("weight", max(own.values(), key=lambda tensor: tensor.numel()))
    kind, reason = kind_of(module, kinds)
    if bypassed and kind is not None:
        kind, reason = None, bypassed
    shape = kind.shape_of(module) if kind else tuple(weight.shape)
    new = [tensor for tensor in own.values() if _identity(tensor) not in counted]  # a tied weight is counted once, at its first layer
    counted.update(map(_identity, new))
    return Layer(
        name=names[0],
        kind=kind.name if kind else None,
        shape=shape,
        dtype=dtypes.name_of(kind.dtype_of(module) if kind else weight.dtype),
        params=sum(prod(shape) if tensor is weight else tensor.numel() for tensor in new),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in new),
        has_bias="bias" in own,
        groups=getattr(module, "groups", 1) if kind else 1,
        aliases=tuple(names[1:]),
        tied=tied,
        reason=reason,
    )


def _tied(owners: dict[nn.Module, list[str]]) -> dict[nn.Module, tuple[str, ...]]:
    """Map each module to the names of those whose weights share memory with its weight, in part or whole."""
    sharing: dict[int, list[nn.Module]] = defaultdict(list)
    for module in owners:
        weight = module._parameters.get("weight")
        if weight is not None:
            sharing[id(weight) if weight.is_meta else weight.untyped_storage().data_ptr()].append(module)
    found = {}
    for modules in sharing.values():
        for module in modules:
            others = tuple(owners[other][0] for other in modules if other is not module and _overlap(_weight(module), _weight(other)))
            found[module] = others
    return found


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def sharing_bias(model: nn.Module) -> dict[str, str]:
    """Map each layer whose bias shares memory, in part or whole, with another parameter to that parameter's name."""
    places: dict[int, dict[tuple[int, str], tuple[str, Tensor]]] = defaultdict(dict)
    for name, module in named_base_modules(model):
        for key, tensor in module._parameters.items():
            if tensor is not None:
                place = id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()
                places[place].setdefault((id(module), key), (name, tensor))  # one entry per module, even with several names
    found: dict[str, str] = {}
    for owners in places.values():
        last: tuple[str, str, Tensor] | None = None  # the tensor so far that ends last
        for (_, key), (name, own) in sorted(owners.items(), key=lambda entry: entry[1][1].data_ptr()):
            if last is not None and _overlap(last[2], own):
                for (one, one_key, _), (other, other_key) in (((name, key, own), last[:2]), (last, (name, key))):
                    if one_key == "bias":
                        found.setdefault(one, f"{other}.{other_key}")
            if last is None or _end(own) > _end(last[2]):
                last = name, key, own
    return found


def _overlap(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    return bool(first.numel() and second.numel()) and first.data_ptr() < _end(second) and second.data_ptr() < _end(first)


def _end(tensor: Tensor) -> int:
    """Return the address after the tensor's last entry."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _identity(tensor: Tensor) -> int:
    """Return a value that is equal for Parameters that share memory; on the meta device, only for the same Parameter."""
    return tensor.data_ptr() or id(tensor)
