"""Giving parameters other shapes while an optimizer holds them: its moments go along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchgraft.errors import AttachError
from torchgraft.method.resize import Carry, Resize

if TYPE_CHECKING:
    from torchgraft.in_memory.parts import SitePart


POWERS = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg"), 1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), 2),
}
"""torch's names of what optimizers keep for each entry of a parameter."""


def check_change(name: str, part: SitePart, change: Resize) -> None:
    """
    Raises:
        AttachError: tensors and config do not fit each other, or a moment could not follow.
    """
    shapes = {key: tuple(change.tensors.get(key, tensor).shape) for key, tensor in part.tensors().items()}
    expected = part.hooks.shapes(part.site, change.config)
    if shapes != expected or not change.tensors.keys() <= change.carry.keys():
        raise AttachError(f"{name}: {part.method} asked for tensors of shapes {shapes}, where its config says {expected}")


def check_resizable(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """
    Raises:
        AttachError: the optimizer holds none of the parameters, or keeps something whose meaning is not known.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    missing = sum(id(parameter) not in held for parameter in trained)
    if missing:
        some = "none" if missing == len(trained) else "only some"
        raise AttachError(f"adapter.step(optimizer, …): this optimizer has {some} of the adapter's parameters; pass the one that trains it")
    for parameter in trained:
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1:
                _check_moment(optimizer, parameter, name, value)


def _check_moment(optimizer: Optimizer, parameter: nn.Parameter, name: str, moment: Tensor) -> None:
    if moment.dtype == torch.uint8:
        raise AttachError(
            f"{type(optimizer).__name__} keeps its moments in 8 bits, block by block, and they cannot follow a change of rank; "
            "use a 32-bit one, such as paged_adamw_32bit"
        )
    if moment.shape != parameter.shape or _power(optimizer, name) == 0:
        raise AttachError(
            f"{type(optimizer).__name__} keeps {name!r} for each parameter, and how that follows a change of rank is not known; "
            "use an Adam, SGD, RMSprop or Adagrad"
        )


@torch.no_grad()
def resize_(parameter: nn.Parameter, value: Tensor, optimizer: Optimizer, carry: Carry) -> None:
    """Give `parameter` the content `value`, of any shape. It stays the same object; its gradient is dropped."""
    for name, moment in _moments(optimizer, parameter).items():
        optimizer.state[parameter][name] = carry(moment.to(parameter.device), _power(optimizer, name)).to(moment.dtype).contiguous()
    parameter.grad = None
    # A graph that is still alive remembers the parameter's shape; only a change of dtype makes autograd forget it.
    parameter.data = parameter.data.new_empty(0, dtype=torch.float64 if parameter.dtype != torch.float64 else torch.float32)
    parameter.data = value.to(parameter.device).contiguous()


def _moments(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps for each entry of the parameter."""
    kept: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return {name: value for name, value in kept.items() if isinstance(value, Tensor) and value.shape == parameter.shape}


def _power(optimizer: Optimizer, name: str) -> int:
    """1 or 2, or 0 if it is not known what the optimizer keeps under this name."""
    if name in ("state1", "state2"):  # bitsandbytes: the first is of squares in the optimizers that have no momentum
        of_squares = name == "state2" or getattr(optimizer, "optimizer_name", "") in ("adagrad", "rmsprop")
        return 2 if of_squares else 1
    return POWERS.get(name, 0)
