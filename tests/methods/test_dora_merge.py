"""DoRA merged, unmerged and stacked with other adapters on one layer, against the same written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from dora_reference import adapted, leaves, move_, norms_counted, turned, weight_with
from models import perturb_
from one_layer import ALPHA, DTYPES, LAYERS, ONE_OF_EACH, RANK, SCALE, canonical, input_of, output, own_dtype, plain
from references import all_bits, assert_same_bits, bits, refused


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_merge_gives_the_dense_weight_and_unmerge_every_bit(layer: str, dtype: str) -> None:
    module = plain(layer, dtype)
    model, adapter = adapted(module, dtype=own_dtype(dtype))
    part, x, before = adapter.parts["0"], input_of(module), bits(module.weight)
    part.m.data[1] = 0  # its row is gone, and cannot be computed back
    unmerged, eps = model(x).detach().double(), torch.finfo(DTYPES[dtype]).eps
    adapter.merge()
    want = weight_with(part, canonical(module))
    tolerance = max(4 * eps, 1e-12) * (want.abs() + 1)
    assert ((canonical(model[0]) - want).abs() <= tolerance).all()
    assert (want - canonical(module)).abs().max() > 0.1
    near = max(16 * eps, 1e-12)
    torch.testing.assert_close(model(x).double(), unmerged, rtol=near, atol=near * float(unmerged.abs().max()))
    adapter.unmerge()
    for cycle in range(20 if layer in ONE_OF_EACH else 2):
        perturb_(adapter.parameters(), 0.1, seed=cycle)
        adapter.merge()
        adapter.unmerge()
        assert torch.equal(bits(model[0].weight), before), f"cycle {cycle}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", ONE_OF_EACH)
def test_a_merge_at_the_start_changes_no_bit(layer: str, dtype: str) -> None:
    module = plain(layer, dtype)
    model = nn.Sequential(deepcopy(module))
    tg.apply(model, "dora", targets=["@all"], rank=2).merge()
    assert torch.equal(model[0].weight, module.weight)


Stack = tuple[nn.Sequential, list[tg.Adapter]]
STACKS = {"dora, dora": ("dora", "dora"), "lora, dora": ("lora", "dora"), "dora, lora": ("dora", "lora"), "all": ("lora", "dora", "dora")}


def stacked(module: nn.Module, methods: tuple[str, ...]) -> Stack:
    """Each is put on when those below it have moved away from their starts."""
    model, found = nn.Sequential(deepcopy(module)).requires_grad_(False), list[tg.Adapter]()
    x = input_of(module)
    for seed, method in enumerate(methods):
        before = model(x)
        found.append(tg.apply(model, method, targets=["@all"], rank=RANK, alpha=ALPHA, name=f"{seed}", dtype=own_dtype(name_of(module))))
        assert torch.equal(model(x), before), "the start changes no bit"
        move_(found[-1], seed)
    return model, found


def name_of(module: nn.Module) -> str:
    return str(module.weight.dtype).removeprefix("torch.")


def composed(module: nn.Module, stack: list[tg.Adapter]) -> Tensor:
    matrix = canonical(module)
    for adapter in stack:
        matrix = weight_with(adapter.parts["0"], matrix)
    return matrix


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("methods", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("layer", ONE_OF_EACH)
def test_adapters_on_one_layer_compose_in_the_order_of_attachment(layer: str, methods: tuple[str, ...], dtype: str) -> None:
    module = plain(layer, dtype)
    model, stack = stacked(module, methods)
    x, near = input_of(module), {"float64": 1e-12, "float32": 2e-5, "bfloat16": 0.05}[dtype]

    def assert_is(*active: tg.Adapter) -> None:
        want = output(module, composed(module, list(active)), x)
        for guard in (torch.enable_grad, torch.no_grad):
            with guard():
                torch.testing.assert_close(model(x).double(), want, rtol=near, atol=near * float(want.abs().max()))

    assert_is(*stack)
    for off in stack:  # the later ones now depend on another weight
        with off.disabled():
            assert_is(*(adapter for adapter in stack if adapter is not off))
    assert_is(*stack)

    for upper in stack[1:]:
        refused(upper.merge, model, "0: dora depends on the weight with the earlier adapters in it.*merge the earlier one first")
    states = []
    for adapter in stack:
        states.append(all_bits(model))
        adapter.merge()
        assert_is(*stack)
    for lower in stack[:-1]:
        refused(lower.unmerge, model, "another adapter was merged after .*; unmerge that one first")
    for adapter, before in zip(reversed(stack), reversed(states), strict=True):
        adapter.unmerge()
        assert_same_bits(model, before)
        assert_is(*stack)


@pytest.mark.parametrize("methods", STACKS.values(), ids=STACKS)
def test_gradients_through_a_stack_are_those_of_the_dense_weight(methods: tuple[str, ...]) -> None:
    module = plain("linear", "float64")
    model, stack = stacked(module, methods)
    x, matrix, inputs = input_of(module), canonical(module), list[tuple[Tensor, Tensor]]()
    for adapter in stack:
        part = adapter.parts["0"]
        own = dict(zip(part.tensors(), leaves(part, *part.tensors()), strict=True))
        matrix = matrix + SCALE * own["B"] @ own["A"]
        matrix = turned(matrix, own["m"]) if "m" in own else matrix
        inputs += [(getattr(part, name), tensor) for name, tensor in own.items()]
    model(x).square().sum().backward()
    gradients = torch.autograd.grad(output(module, matrix, x).square().sum(), [tensor for _, tensor in inputs])
    for (parameter, _), gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lower", ["lora", "dora"])
def test_a_cached_norm_follows_what_happens_below(lower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = plain("linear")
    model, (below, above) = stacked(module, (lower, "dora"))
    x = input_of(module)

    def below_is_trained() -> None:
        optimizer = below.optimizer("adamw_32bit", lr=0.1)
        model(x).square().mean().backward()
        optimizer.step()

    changes: dict[str, tuple[Callable[[], object], bool]] = {
        "nothing, or a first look": (lambda: None, True),
        "trained": (below_is_trained, True),
        "merged": (below.merge, True),
        "unmerged": (below.unmerge, True),
        "off": (lambda: setattr(below, "active", False), False),
        "on": (lambda: setattr(below, "active", True), True),
        "detached": (below.detach, False),
    }
    for name, (change, there) in changes.items():
        change()
        want = output(module, composed(module, [below, above] if there else [above]), x)
        with torch.no_grad(), norms_counted(monkeypatch) as calls:
            for _ in range(2):
                torch.testing.assert_close(model(x).double(), want, atol=1e-4, rtol=0, msg=name)
        assert sum(site is above.parts["0"].site for site in calls) == 1, name
