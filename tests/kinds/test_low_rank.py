"""Adding a low-rank change to a layer's own output in place: under everything that torch does with a forward."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchgraft as tg
from models import perturb_

RANK, ALPHA = 3, 5.0
SCALE = ALPHA / RANK
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "pissa": {"method": "lora", "init": "pissa"},
    "adalora": {"allocator": "budget", "total_steps": 9},
    "dora": {},
    "lora, wider than its base": {"method": "lora", "base": torch.float32},
    "dora, wider than its base": {"method": "dora", "base": torch.float32},
}
EACH = pytest.mark.parametrize("method", METHODS)
X = torch.randn(4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(method: str, seed: int = 0, *, inplace: bool = True) -> tuple[nn.Sequential, tg.Adapter]:
    """Linear layers, square and not, with a perturbed adapter in float64; ReLU writes over what the first returned."""
    torch.manual_seed(seed)
    options = {"method": method, "base": torch.float64, **METHODS[method]}
    layers = (nn.Linear(6, 10), nn.ReLU(inplace), nn.Linear(10, 10, bias=False), nn.Tanh(), nn.Linear(10, 4))
    model = nn.Sequential(*layers).to(options.pop("base"))
    adapter = tg.apply(model, rank=RANK, alpha=ALPHA, dtype="float64", targets="*", **options)
    perturb_(adapter.parameters(), seed=seed + 1)
    return model, adapter


def input_of(model: nn.Sequential) -> Tensor:
    return X.clone().to(model[0].weight.dtype)


def close(got: Tensor, want: Tensor, model: nn.Sequential) -> None:
    eps = torch.finfo(model[0].weight.dtype).eps
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=100 * eps * float(want.detach().abs().max()))


def dense(model: nn.Sequential, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same in float64, with each weight written out."""
    x = x.double()
    for name, layer in model.named_children():
        if not isinstance(layer, nn.Linear):
            x = type(layer)()(x)
            continue
        own = {key.rpartition(".")[2]: value for key, value in params.items() if key.startswith(f"{name}.")}
        a, b, weight = own["A"], own["B"], layer.weight.double()
        if "E" in own:
            a = own["E"] * a
        if "A0" in own:
            weight = weight - SCALE * own["B0"] @ own["A0"]
        weight = weight + SCALE * b @ a
        if "m" in own:  # the norm is taken for a constant
            weight = own["m"][:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
        x = F.linear(x, weight, None if layer.bias is None else layer.bias.double())
    return x


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters and buffers by their names in the model."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if ".adapters." in name}


def trained(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors.values() if tensor.requires_grad]


@EACH
def test_second_derivatives(method: str) -> None:
    model, _ = network(method)
    x, results = input_of(model).requires_grad_(), []
    for forward in (lambda: model(x), lambda: dense(model, own_tensors(model), x)):
        inputs = [x, *trained(own_tensors(model))]
        first = torch.autograd.grad(forward().tanh().sum(), inputs, create_graph=True)
        assert all(gradient.requires_grad for gradient in first)
        results.append([*first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)])
    for got, want in zip(*results, strict=True):
        close(got, want, model)


@EACH
def test_vmap_over_adapters(method: str) -> None:
    models = [network(method, seed)[0] for seed in range(3)]
    x = input_of(models[0])
    for model in models[1:]:
        model.load_state_dict({**model.state_dict(), **{k: v for k, v in models[0].state_dict().items() if ".adapters." not in k}})
    stacked = {name: torch.stack([model.state_dict()[name] for model in models]) for name in own_tensors(models[0])}
    got = vmap(lambda own: functional_call(models[0], own, x))(stacked)
    for result, model in zip(got, models, strict=True):
        close(result, model(x), model)
    params, buffers = stack_module_state(models)  # type: ignore[arg-type]
    both = vmap(lambda own, held, x: functional_call(models[0], {**own, **held}, x))(params, buffers, x[:3])
    close(both[1], models[1](x[1]), models[1])


@EACH
def test_gradients_by_sample(method: str) -> None:
    model, _ = network(method)
    own = {name: tensor.detach() for name, tensor in own_tensors(model).items() if tensor.requires_grad}
    got = vmap(grad(lambda params, x: functional_call(model, params, x).square().sum()), in_dims=(None, 0))(own, input_of(model))
    for sample, x in enumerate(input_of(model)):
        model.zero_grad()
        model(x).square().sum().backward()
        for name, parameter in own_tensors(model).items():
            if parameter.requires_grad:
                close(got[name][sample], parameter.grad, model)


@EACH
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # by torch.func itself
def test_forward_mode(method: str) -> None:
    model, _ = network(method)
    x = input_of(model)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    got = jvp(model, (x,), (tangent,))
    want = jvp(lambda x: dense(model, own_tensors(model), x), (x,), (tangent,))
    for one, other in zip(got, want, strict=True):
        close(one, other, model)


@EACH
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(method: str, reentrant: bool) -> None:
    results = []
    for run in (lambda model, x: checkpoint(model, x, use_reentrant=reentrant), lambda model, x: model(x)):
        model, adapter = network(method)
        x = input_of(model).requires_grad_()
        run(model, x).square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in adapter.parameters())])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


class SavedForBackward:
    """Counts the bytes that a forward saves for backward; tensors in the same memory count once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def __enter__(self) -> SavedForBackward:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._alive.append(tensor)
        self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


TOKENS, IN, OUT = 50, 30, 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_kept_for_backward(method: str, bias: bool, dtype: torch.dtype) -> None:
    """Beside input, frozen weight and parameters: x·Aᵀ; for DoRA one output, in the layer's own type, and some vectors."""
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias)).to(dtype)
    adapter = tg.apply(model, method, "*", rank=RANK)
    perturb_(adapter.parameters())
    x = torch.randn(TOKENS, IN).to(dtype).requires_grad_()
    with SavedForBackward() as kept:
        model(x)
    there = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.state_dict(keep_vars=True).values())}
    more = sum(size for place, size in kept.sizes.items() if place not in there)
    expected = 4 * TOKENS * RANK + (method == "dora") * (TOKENS * OUT * dtype.itemsize + 4 * 4 * OUT)
    assert 4 * TOKENS * RANK <= more <= expected


def test_a_layer_that_trains_below_an_adapter_keeps_its_gradient() -> None:
    model, _ = network("lora")
    model[0].weight.requires_grad_(True)
    model(X).square().sum().backward()
    want = deepcopy(model)
    want.zero_grad()
    dense(want, own_tensors(want), X).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, want[0].weight.grad)


def test_what_a_plugin_s_base_holds_is_never_written_to() -> None:
    """A second adapter adds to what the first returned, which autograd and others may still need."""
    model, first = network("dora", inplace=False)
    second = tg.apply(model, "lora", "*", rank=2, name="second", dtype="float64")
    perturb_(second.parameters(), seed=5)
    seen: list[tuple[Tensor, Tensor]] = []
    forward = first.parts["0"]._forward

    def watched(*args: Any) -> Any:
        result = forward(*args)
        seen.append((result, result.detach().clone()))
        return result

    first.parts["0"]._forward = watched
    model(X).square().sum().backward()
    assert all(torch.equal(result, copy) for result, copy in seen)
    assert seen
    assert all(parameter.grad is not None for parameter in [*first.parameters(), *second.parameters()])


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("trained", "products"), [("A", 4), ("B", 1), ("AB", 5)])
def test_no_product_is_taken_for_a_gradient_that_nobody_asked_for(trained: str, products: int) -> None:
    """In backward, of factors wider than their base; with A the gradient of the input is asked for too, and so the layer's product."""
    model = nn.Sequential(nn.Linear(6, 10))
    adapter = tg.apply(model, "lora", "*", rank=RANK, dtype="float64")
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(name[-1] in trained)
    y = model(input_of(model).requires_grad_("A" in trained)).sum()
    with Products() as counted:
        y.backward()
    assert counted.count == products
