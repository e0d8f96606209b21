"""Change the shapes of parameters that an optimizer holds, and convert its moments."""

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
"""torch's name of an optimizer's moment → the power of the gradient that it averages."""


def check_change(name: str, part: SitePart, change: Resize) -> None:
    """Check one site's new tensors.

    Raises:
        AttachError: the tensors do not have the shapes that the new config implies, or one has no conversion for its moments.
    """
    shapes = {key: tuple(change.tensors.get(key, tensor).shape) for key, tensor in part.tensors().items()}
    expected = part.hooks.shapes(part.site, change.config)
    if shapes != expected or not change.tensors.keys() <= change.carry.keys():
        raise AttachError(
            f"{name}: {part.method} changes its tensors to the shapes {shapes}, but its config implies {expected}; "
            "every changed tensor also needs an entry in Resize.carry"
        )


def check_resizable(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Check that the optimizer holds the parameters and that its moments can be converted.

    Raises:
        AttachError: a parameter is missing from the optimizer, or it has state that cannot be converted.
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
            f"{type(optimizer).__name__} stores its moments in 8-bit blocks, which cannot follow a change of rank; "
            "use a 32-bit optimizer, such as paged_adamw_32bit"
        )
    if moment.shape != parameter.shape or _power(optimizer, name) == 0:
        raise AttachError(
            f"{type(optimizer).__name__} stores {name!r} for each parameter, and torchgraft cannot convert it when a rank changes; "
            "use an Adam, SGD, RMSprop or Adagrad"
        )


@torch.no_grad()
def resize_(parameter: nn.Parameter, value: Tensor, optimizer: Optimizer, carry: Carry) -> None:
    """Replace the content of `parameter` by `value`, of any shape. It stays the same object; its gradient is dropped."""
    for name, moment in _moments(optimizer, parameter).items():
        optimizer.state[parameter][name] = carry(moment.to(parameter.device), _power(optimizer, name)).to(moment.dtype).contiguous()
    parameter.grad = None
    # A live autograd graph holds the parameter's old shape; only a change of dtype makes autograd drop it.
    parameter.data = parameter.data.new_empty(0, dtype=torch.float64 if parameter.dtype != torch.float64 else torch.float32)
    parameter.data = value.to(parameter.device).contiguous()


def _moments(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimizer's tensors that have one value for each entry of the parameter."""
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape}


def _power(optimizer: Optimizer, name: str) -> int:
    """Return the power of the gradient that the optimizer averages under this name: 1 or 2, or 0 if unknown."""
    if name in ("state1", "state2"):  # bitsandbytes: optimizers without momentum store squares in state1
        of_squares = name == "state2" or getattr(optimizer, "optimizer_name", "") in ("adagrad", "rmsprop")
        return 2 if of_squares else 1
    return POWERS.get(name, 0)
