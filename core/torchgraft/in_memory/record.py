"""The record of a model's adapters, and of the settings that are restored when the last adapter is detached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from torchgraft.in_memory import fast_paths
from torchgraft.in_memory.places import are_unchanged, check_in_place, steps_to_parts
from torchgraft.kinds import quantized
from torchgraft.kinds.kind import traced

STATE = "_torchgraft"
"""Name of the model's attribute that holds its `Record`. It is a plain attribute, so `deepcopy` and `pickle` copy it with the model."""


@dataclass
class Record:
    """The adapters on one model, and the settings that attaching the first one changed."""

    adapters: dict[str, Any] = field(default_factory=dict)
    """Name → `Adapter`, in the order of attaching. (The class is defined in a module that imports this one.)"""
    trainable: list[nn.Parameter] = field(default_factory=list)
    """The base's parameters that required a gradient."""
    nested: list[nn.TransformerEncoder] = field(default_factory=list)
    """The encoders that used nested tensors."""
    repacking: list[nn.Module] = field(default_factory=list)
    """The 4-bit layers that could be repacked in eval."""
    hook: RemovableHandle | None = None
    """Handle of `_before_forward`."""


def adapters_on(model: nn.Module) -> dict[str, Any]:
    """Return a new dictionary, name → `Adapter`; empty if the model has none."""
    return dict(model.__dict__[STATE].adapters) if STATE in model.__dict__ else {}


def freeze(model: nn.Module) -> None:
    """Freeze the base and stop torch's shortcuts that bypass adapters. Does nothing on a model that has adapters."""
    if STATE in model.__dict__:
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    nested = fast_paths.stop_nesting(model)
    hook = model.register_forward_pre_hook(_before_forward)
    setattr(model, STATE, Record(trainable=trainable, nested=nested, repacking=quantized.stop_repacking(model), hook=hook))


def _before_forward(model: nn.Module, args: Any) -> None:
    """Forward pre-hook: all adapters that are active must be in place."""
    if not traced():
        for name, adapter in model.__dict__[STATE].adapters.items():
            if not are_unchanged(adapter.way) and adapter.active:
                sites = (*adapter.parts, *adapter.copies)
                check_in_place(model, name, sites)
                adapter.way = steps_to_parts(model, name, sites)


def add(model: nn.Module, name: str, adapter: Any) -> None:
    """Add an adapter to the model's record of attached adapters, which `freeze` must have created."""
    model.__dict__[STATE].adapters[name] = adapter


def remove(model: nn.Module, name: str) -> None:
    """Remove an adapter from the record; with the last one, undo what `freeze` changed."""
    record: Record = model.__dict__[STATE]
    del record.adapters[name]
    if record.adapters:
        return
    for parameter in record.trainable:
        parameter.requires_grad_(True)
    for encoder in record.nested:
        encoder.use_nested_tensor = True
    quantized.let_repack(record.repacking)
    if record.hook is not None:
        record.hook.remove()
    delattr(model, STATE)
