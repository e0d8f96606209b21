"""Checks of adapter_forward."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from torchgraft.testing.cases import Case, backward, part_of
from torchgraft.testing.checks import FLOATS, check
from torchgraft.testing.compare import SkippedError, claimed, close, require, same_bits

FORWARD = "look at adapter_forward"
COMPILES = "2.12"
"""First version of torch whose compiler makes one graph of the layers that torchgraft extends; earlier ones warn, or break the graph."""


@check(*FLOATS, core=True)
def dtype(case: Case) -> None:
    """The output has the dtype and shape of base(x), also under autocast. Parameters are float32, or have the option `dtype`."""
    model, adapter = case.adapted()
    base = case.base()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = model(case.x), base(case.x)
        where = " under autocast" if autocast else ""
        require(found.dtype == expected.dtype, f"the output{where} is {found.dtype}, and base(x) is {expected.dtype}; {FORWARD}")
        require(found.shape == expected.shape, f"the output{where} is {tuple(found.shape)}, base(x) {tuple(expected.shape)}; {FORWARD}")
    allowed = {torch.float32, getattr(torch, getattr(adapter.config, "dtype", "float32"))}
    for name, parameter in adapter.named_parameters():
        require(
            parameter.dtype in allowed,
            f"{name} is {parameter.dtype}, in which small steps are lost: parameters must be float32, or have the dtype of an option "
            "`dtype`; look at adapter_init",
        )


@check(*FLOATS)
def input_untouched(case: Case) -> None:
    """Neither x nor base(x) is changed in place, because other code may hold these tensors."""
    model, adapter = case.adapted()
    part, seen = part_of(adapter), list[tuple[Tensor, Tensor]]()

    def base(x: Tensor) -> Tensor:
        with adapter.disabled():
            output: Tensor = model(x)
        seen.append((output, output.detach().clone()))
        return output

    for enabled in (False, True):
        x = case.x
        with torch.set_grad_enabled(enabled):
            part.hooks.forward(part.site, part.config, part.params(), x, base)
        same_bits(x, case.x, "the input x after the forward", f"{FORWARD}: it writes to x")
        for output, before in seen:
            same_bits(output, before, "base(x) after the forward", f"{FORWARD}: it writes to what base returned; make a new tensor")


@check(core=True)
def batch(case: Case) -> None:
    """An entry's output does not depend on the rest of the batch, because a merged layer's does not. An empty batch works."""
    model, _ = case.adapted()
    whole = model(case.x)
    hint = f"{FORWARD}: it mixes the entries of a batch, or assumes a certain number of dimensions of the input"
    close(model(case.x[:1]), whole[:1], case.eps, "the output of the first entry alone", hint)
    if not case.kind.quantized:
        close(model(case.x[0]), whole[0], case.eps, "the output of the first entry without a batch", hint)
        require(model(case.x[:0]).shape == whole[:0].shape, f"an empty batch gives {tuple(model(case.x[:0]).shape)}; {hint}")


@check()
def modes(case: Case) -> None:
    """In eval the output is the same each time, also under no_grad and inference_mode, and it follows changes of the frozen weight."""
    model, adapter = case.adapted()
    expected = model(case.x).detach()
    same_bits(model(case.x).detach(), expected, "the output of a second forward in eval", f"{FORWARD}: something in it changes")
    with torch.no_grad():
        close(model(case.x), expected, case.eps, "the output under no_grad", FORWARD)
    with torch.inference_mode():
        close(model(case.x), expected, case.eps, "the output under inference_mode", FORWARD)
    same_bits(model(case.x).detach(), expected, "the output after forwards under no_grad and inference_mode", FORWARD)
    weight: Tensor = part_of(adapter).site.module.weight  # type: ignore[union-attr, assignment]
    if weight.is_floating_point():
        with torch.no_grad():
            model(case.x)
            weight.mul_(1.5)
            hint = "pass every tensor that a cached value depends on, such as site.weight_tensors(), to site.cached"
            close(model(case.x), deepcopy(model)(case.x), case.eps, "the output after the frozen weight was changed", hint)


@check()
def global_state(case: Case) -> None:
    """Attaching, forward in eval, backward, merge and unmerge do not change torch's random generator, default dtype or grad mode."""
    torch.rand(3)
    before = _state()
    for stage in _life(case):
        for what, value in _state().items():
            require(value == before[what], f"{stage} changed {what}, which a method must not do; look at the hooks that run then")


def _life(case: Case) -> Iterator[str]:
    """Run an adapter through its stages; yield the name of each after it is done."""
    model, adapter = case.adapted()
    yield "attaching"
    output = model(case.x)
    yield "forward"
    backward(output)
    yield "backward"
    adapter.merge()
    yield "merge"
    adapter.unmerge()
    yield "unmerge"


def _state() -> dict[str, object]:
    return {
        "the state of torch's global generator": torch.get_rng_state().tolist(),
        "torch's default dtype": torch.get_default_dtype(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "whether torch is deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch's number of threads": torch.get_num_threads(),
    }


@check(*FLOATS, core=True)
def disable(case: Case) -> None:
    """Within `adapter.disabled()` the output equals the base's to the last bit; afterwards the previous state is restored."""
    model, adapter = case.adapted()
    adapted, base = model(case.x), case.base()(case.x)
    hint = "look for changes that the method makes to the layer itself"
    with adapter.disabled():
        same_bits(model(case.x), base, "the output while disabled", hint)
        with adapter.disabled():
            pass
        require(not adapter.active, "a nested disabled() switched the adapter on")
    same_bits(model(case.x), adapted, "the output after disabled()", hint)


@check(layers="dense", first=True)
def compile_(case: Case) -> None:
    """torch.compile compiles the layer into one graph with the same output and gradients; needs torch 2.12.

    `Method.compiles` claims this.
    """
    claimed(case.hooks.method.compiles, "compiles")
    if TorchVersion(torch.__version__) < COMPILES:
        raise SkippedError(f"torch.compile needs torch {COMPILES} or newer here")
    model, adapter = case.adapted()
    hint = f"{FORWARD}: no data-dependent Python, no print, no .item(); or set Method(compiles=False)"
    expected = model(case.x)
    backward(expected)
    gradients = [(parameter, parameter.grad.clone()) for parameter in adapter.parameters() if parameter.grad is not None]
    model.zero_grad()
    torch.compiler.reset()
    try:
        found = torch.compile(model, backend="eager", fullgraph=True)(case.x)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        require(False, f"torch.compile finds no single graph: {reason.strip()}; {hint}")
    finally:
        torch.compiler.reset()
    close(found, expected, case.eps, "the compiled layer's output", hint)
    backward(found)
    for parameter, gradient in gradients:
        assert parameter.grad is not None, f"a parameter gets no gradient through the compiled layer; {hint}"
        close(parameter.grad, gradient, case.eps, "a gradient through the compiled layer", hint)
