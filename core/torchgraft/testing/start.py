"""Checks of a new adapter: adapter_init, adapter_shapes, and the initial output."""

from __future__ import annotations

import torch
from torch import Tensor

from torchgraft.testing.cases import Case
from torchgraft.testing.checks import FLOATS, check
from torchgraft.testing.compare import claimed, close, finite, require, same_bits

INIT = "look at adapter_init"


@check(*FLOATS, core=True)
def init(case: Case) -> None:
    """adapter_init returns finite tensors of the shapes that adapter_shapes returns, and the same values for the same generator."""
    model = case.base()
    site = case.site(model)
    config = case.config(site)
    tensors = _made(case, model, seed=1)
    require(bool(tensors), f"adapter_init returned no tensors, so there is nothing to train; {INIT}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = case.hooks.shapes(site, config)
    source = "adapter_shapes says" if case.hooks.has("adapter_shapes") else "on a weight without values it made"
    require(shapes == expected, f"adapter_init made tensors of shapes {shapes}, and {source} {expected}; {INIT}")
    frozen = {tensor.untyped_storage().data_ptr() for tensor in model.parameters() if tensor.numel()}
    for name, tensor in tensors.items():
        finite(tensor, name, INIT)
        require(tensor.device.type == "cpu", f"{name} is on {tensor.device}, not on the CPU; {INIT}")
        trained = name not in case.hooks.method.buffers
        require(not trained or tensor.is_floating_point(), f"{name} is {tensor.dtype}, which cannot be trained: list it in Method.buffers")
        require(tensor.untyped_storage().data_ptr() not in frozen, f"{name} shares the memory of the frozen weight: return a copy")
    again = _made(case, model, seed=1)
    hint = "draw random numbers from `generator` only, in adapter_init"
    for name, tensor in tensors.items():
        same_bits(again[name], tensor, f"{name}, made a second time from the same generator,", hint)


def _made(case: Case, model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Return the result of adapter_init, and check that it leaves torch's global generator alone, whose state differs at each call."""
    site = case.site(model)
    torch.rand(3)
    before = torch.get_rng_state()
    tensors = case.hooks.init(site, case.config(site), torch.Generator().manual_seed(seed))
    require(torch.get_rng_state().equal(before), "adapter_init drew from torch's global generator; draw from `generator` only")
    return tensors


@check(*FLOATS, core=True)
def no_op(case: Case) -> None:
    """With default options, the initial output equals the base's. `Method.starts_unchanged` claims this."""
    claimed(case.hooks.method.starts_unchanged, "starts_unchanged")
    model, _ = case.adapted(perturb=False)
    hint = "look at how adapter_init and adapter_forward start, or set Method(starts_unchanged=False)"
    for training in (False, True):
        expected = case.base().train(training)(case.x)
        close(model.train(training)(case.x), expected, case.eps, "the output at the start, against the base's", hint)
