"""Checks of training: which tensors get gradients, whether these are right, and what must not change."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchgraft.in_memory.adapter import Adapter
from torchgraft.testing.cases import Case, Model, backward, perturb_, weighted
from torchgraft.testing.checks import FLOATS, check
from torchgraft.testing.compare import claimed, close, finite, require, snapshot, unchanged

STEPS = 60
"""Number of optimizer steps: enough for a method that acts every 50 steps."""


@check(*FLOATS, core=True)
def trains(case: Case) -> None:
    """Only the adapter's parameters are trained. Each gets a gradient, which is not all zero once the parameters are perturbed."""
    model, adapter = case.adapted(perturb=False)
    for when in ("at the start", "with perturbed parameters"):
        model.zero_grad()
        backward(model(case.x))
        _check_only_own(model, adapter)
        for name, parameter in adapter.named_parameters():
            hint = "look for a detach(), or a tensor that adapter_forward does not use: such a one belongs in Method.buffers"
            require(parameter.requires_grad, f"{name} does not require a gradient; {hint}")
            require(parameter.grad is not None, f"{name} gets no gradient {when}; {hint}")
            finite(parameter.grad, f"the gradient of {name} {when}", "look at adapter_forward")
            zero = parameter.numel() > 0 and not torch.count_nonzero(parameter.grad)  # type: ignore[arg-type]
            require(when == "at the start" or not zero, f"the gradient of {name} is all zero {when}, so it does not train; {hint}")
        if when == "at the start":
            perturb_(adapter)


def _check_only_own(model: Model, adapter: Adapter) -> None:
    own = {id(parameter) for parameter in adapter.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            hint = "the base is frozen: a method may read its weight, and must not train it"
            require(not parameter.requires_grad, f"the base's {name} requires a gradient; {hint}")
            require(parameter.grad is None, f"the base's {name} got a gradient; {hint}")


@check(torch.float64, layers="dense")
def gradients(case: Case) -> None:
    """The gradients of x and of the parameters agree with finite differences in float64.

    Parameters in `Method.partial_gradients` are not checked.
    """
    model, adapter = case.adapted()
    model.double()
    x = case.x.requires_grad_(case.input.is_floating_point())
    claimed(set(dict(_checked(case, adapter, x))) != set(), "any full gradient")
    backward(model(x))
    for name, tensor in _checked(case, adapter, x):
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        hint = "look for a detach() or a custom backward, or name the parameter in Method.partial_gradients"
        require(tensor.grad is not None, f"{name} gets no gradient; {hint}")
        found = (tensor.grad * direction).sum()  # type: ignore[operator]
        expected = _slope(model, x, tensor, direction)
        close(found, expected, 1e-7, f"the gradient of {name}, along a random direction and against finite differences", hint)


def _checked(case: Case, adapter: Adapter, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    partial = case.hooks.method.partial_gradients
    if x.requires_grad:
        yield "x", x
    yield from ((name, tensor) for name, tensor in adapter.named_parameters() if name.rpartition(".")[2] not in partial)


@torch.no_grad()
def _slope(model: Model, x: Tensor, tensor: Tensor, direction: Tensor, step: float = 1e-6) -> Tensor:
    """Return (L(t + εv) - L(t - εv)) / 2ε."""
    before, losses = tensor.clone(), []
    for sign in (1, -1):
        tensor.copy_(before + sign * step * direction)
        losses.append(weighted(model(x)))
    tensor.copy_(before)
    return (losses[0] - losses[1]) / (2 * step)


@check(*FLOATS, core=True)
def base_untouched(case: Case) -> None:
    """Attaching, forward, backward and optimizer steps change no weight, bias or buffer of the base."""
    model = case.base()
    before, hint = snapshot(model), "look for what writes to the layer: site.module, site.weight() or site.bias in place"
    adapter = case.attach(model)
    unchanged(model, before, "after attaching", hint)
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=0.1, weight_decay=0.1))
    for training in (False, True):
        output = model.train(training)(case.x)
        unchanged(model, before, "after a forward", hint)
        backward(output)
        unchanged(model, before, "after a backward", hint)
        optimizer.step()
        unchanged(model, before, "after an optimizer's step", hint)


@check(layers="dense", first=True)
def param_groups(case: Case) -> None:
    """The optimizer's groups contain every parameter once, with rates proportional to `lr`. adapter_param_groups claims this."""
    claimed(case.hooks.has("adapter_param_groups"), "adapter_param_groups")
    _, adapter = case.adapted()
    single, double = (adapter.param_groups(lr=lr, weight_decay=0.1) for lr in (0.125, 0.25))
    for once, twice in zip(single, double, strict=True):
        found = (once.get("lr"), twice.get("lr"))
        hint = "every group must have an lr that is proportional to the given lr; look at adapter_param_groups"
        require(None not in found and found[1] == 2 * found[0], f"with lr = 0.125 and 0.25 a group has {found[0]} and {found[1]}; {hint}")  # type: ignore[operator]


@check(layers="dense", first=True)
def steps(case: Case) -> None:
    """With adapter_penalty and adapter_step, training stays finite, and the trained adapter merges."""
    hooks = [name for name in ("adapter_step", "adapter_penalty") if case.hooks.has(name)]
    claimed(bool(hooks), "adapter_step or adapter_penalty")
    hint = f"look at {' and '.join(hooks)}"
    model, adapter = case.adapted(perturb=False)
    model.train()
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=1e-2, weight_decay=0.0))
    for step in range(1, STEPS + 1):
        penalty = adapter.penalty()
        require(penalty.shape == (), f"adapter_penalty returns a tensor of shape {tuple(penalty.shape)}, not a scalar; {hint}")
        loss = (model(case.x) - 1).square().mean() + penalty
        finite(loss, f"the loss at step {step}", hint)
        torch.autograd.backward(loss)
        optimizer.step()
        adapter.step(optimizer, step, {"val_loss": 1.0})
        optimizer.zero_grad()
        for name, parameter in adapter.named_parameters():
            finite(parameter, f"{name} after step {step}", hint)
    expected = model.eval()(case.x)
    adapter.merge()
    close(model(case.x), expected, case.eps, f"the output merged after {STEPS} steps", hint)
