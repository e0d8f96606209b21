"""Create optimizers by name, and check the parameter groups passed to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torchgraft.errors import ConfigError, PluginError, near

TORCH = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}
FAMILIES = {"adamw": "AdamW", "adam": "Adam", "lion": "Lion"}
BITSANDBYTES = {
    f"{'paged_' if paged else ''}{family}_{bits}bit": f"{'Paged' if paged else ''}{cls}{bits}bit"
    for paged in (False, True)
    for family, cls in FAMILIES.items()
    for bits in (32, 8)
}
"""Name in `Adapter.optimizer` → class in bitsandbytes.optim. Paged optimizers move moments to host memory when GPU memory is full."""


def check_groups(groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, nn.Parameter], method: str) -> None:
    """Check that a method's groups contain every parameter once.

    Raises:
        PluginError: a parameter is missing, so it would not be trained, or is there several times.
    """
    counts = Counter(id(parameter) for group in groups for parameter in group["params"])
    for name, parameter in parameters.items():
        if counts[id(parameter)] != 1:
            raise PluginError(f"{name} is {counts[id(parameter)]} times in the parameter groups of {method}; it must be there once")


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float, **options: Any) -> Optimizer:
    """Create the optimizer called `name`, of torch or of bitsandbytes.

    Raises:
        ConfigError: there is no such optimizer, or the parameters' device has no paging.
    """
    if name in TORCH:
        plain: Optimizer = getattr(torch.optim, TORCH[name])(groups, lr=lr, **options)
        return plain
    if name not in BITSANDBYTES:
        known = [*TORCH, *BITSANDBYTES]
        raise ConfigError(f"there is no optimizer {name!r}{near(name, known)}; there are {', '.join(known)}")
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if name.startswith("paged_") and devices - {"cuda", "xpu"}:
        raise ConfigError(
            f"{name} pages its moments between GPU and host memory, but these parameters are on {', '.join(sorted(devices))}, which has no "
            f"paging; use {name.removeprefix('paged_')!r}"
        )
    import bitsandbytes

    found: Optimizer = getattr(bitsandbytes.optim, BITSANDBYTES[name])(groups, lr=lr, **options)
    return found
