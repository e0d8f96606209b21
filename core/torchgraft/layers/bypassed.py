"""Find layers that a model bypasses: it reads their weight and does not call their forward, so an adapter would have no effect."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from torchgraft.layers.layer import BYPASSED

NAMES = frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "dt_proj", "conv1d", "conv_1d"})
"""Names of layers that published models bypass. Of others, methods also read the weight for its dtype, or to resize an embedding."""


def bypassed_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Return the bypassed submodules of `model`, with the reason."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        names = module._modules.keys() if isinstance(module, nn.MultiheadAttention) else bypassed_children(type(module))  # type: ignore[arg-type]
        for name in names:
            child = module._modules.get(name)
            if child is not None:
                found[child] = BYPASSED.format(f"a {type(module).__name__}")
    return found


@cache
def bypassed_children(cls: type) -> frozenset[str]:
    """Return the children `x` among `NAMES` of which a method of the class reads `self.x.weight`, other than its dtype or shape.

    Mixers of Mamba pass these weights to a kernel.
    """
    owners = (owner for owner in cls.__mro__ if owner.__module__.partition(".")[0] != "torch")
    methods = (inspect.unwrap(method) for owner in owners for method in vars(owner).values() if isinstance(method, FunctionType))
    return NAMES.intersection(child for method in methods for child in _weights_read(method))


def _weights_read(method: Callable[..., Any]) -> Iterator[str]:
    """Yield each x of an expression `self.x.weight` in the method, unless it is an `__init__`."""
    code: CodeType | None = getattr(method, "__code__", None)
    if code is None or not code.co_argcount or method.__name__ == "__init__":
        return
    steps = list(dis.get_instructions(code))
    for owner, child, weight, after in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
        is_weight = child.opname == weight.opname == "LOAD_ATTR" and weight.argval == "weight"
        if is_weight and _loads(owner, code.co_varnames[0]) and after.argval not in ("dtype", "device", "shape", "size"):
            yield child.argval


def _loads(step: dis.Instruction, variable: str) -> bool:
    """Whether the last value that the instruction loads is this variable: later versions of Python load two at once."""
    names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    return step.opname.startswith("LOAD_FAST") and names[-1:] == (variable,)
