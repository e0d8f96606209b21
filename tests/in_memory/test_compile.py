"""torch.compile: one graph, whatever the method and the layer, with eager's outputs and gradients, and made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import torchgraft as tg
from models import build, perturb_
from references import compiles
from torchgraft.plugin.registry import registry
from torchgraft.testing.cases import Case, Subject

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "adalora": [{}, {"allocator": "budget", "total_steps": 10}],
    "qlora": [{"compute_dtype": "float32"}],
}
METHODS = [(method.name, options) for method in registry().methods() for options in OPTIONS.get(method.name, [{}])]
KINDS = ("Linear", "Conv1D", "Embedding", "Conv2d", "Linear4bit")
ON_KINDS = [(*method, kind) for method in METHODS for kind in KINDS if kind in (registry().method(method[0]).kinds or KINDS)]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
RANK = 4

pytestmark = [
    compiles,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # by dynamo, before torch 2.13
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),  # by inductor itself
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # by torch, of bitsandbytes' autograd function
    pytest.mark.filterwarnings("ignore:.*was never called, so adalora:torchgraft.TorchgraftWarning"),
]


def named(value: object) -> str | None:
    return "-".join(map(str, value.values())) or "plain" if isinstance(value, dict) else None


def each_method(argument: str = "method, options") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(argument, METHODS, ids=named)


class Compiled:
    """A compiled model, and how many graphs and breaks it took so far."""

    def __init__(self, model: nn.Module, backend: str = "aot_eager") -> None:
        torch._dynamo.reset()
        counters.clear()
        self._counter = CompileCounterWithBackend(backend)
        self.model = torch.compile(model, backend=self._counter)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def graphs(self) -> int:
        return self._counter.frame_count

    @property
    def breaks(self) -> int:
        return sum(counters["graph_break"].values())


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 128, bias=False), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.q(x))))


def blocks(number: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(Block() for _ in range(number)))


def put(model: nn.Module, method: str, name: str = "default", **options: Any) -> tg.Adapter:
    adapter = tg.apply(model, method, rank=RANK, name=name, **options)
    perturb_(adapter.parameters(), 0.1, seed=len(tg.adapters(model)))
    return adapter


def run(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The output and the gradients, with the same random numbers each time."""
    torch.manual_seed(2)
    for parameter in parameters:
        parameter.grad = None
    output = forward(x)
    output.float().sin().sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    return [output.detach(), *(parameter.grad for parameter in parameters if parameter.grad is not None)]


def assert_alike(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert all(tensor.abs().max() > 0 for tensor in expected), "zeros are always alike"
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=tolerance * float(other.abs().max()), rtol=tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("method", "options", "kind"), ON_KINDS, ids=named)
def test_every_kind_of_layer_is_one_graph(method: str, options: dict[str, Any], kind: str, dropout: float) -> None:
    subject = Subject(method, {"rank": 2, "dropout": dropout, **options})
    found = next(examples for own, examples in subject.examples if own.name == kind)
    for example, x in found:
        case = Case(method, subject.options, registry().kind(kind), example, x, torch.float32)
        base = Compiled(case.base())
        base(case.x)
        assert (base.graphs, base.breaks) == (1, 0), "the layer by itself"
        model, adapter = case.adapted()
        model.train()
        compiled = Compiled(model)
        assert_alike(run(compiled, case.x, adapter.parameters()), run(model, case.x, adapter.parameters()))
        assert (compiled.graphs, compiled.breaks) == (1, 0)
        model.eval()
        with torch.no_grad():
            assert_alike([compiled(case.x)], [model(case.x)])
        assert compiled.graphs == 2, "one in training, one in eval"
        assert compiled.breaks == 0


@pytest.mark.parametrize("backend", BACKENDS)
@each_method()
def test_under_autocast(method: str, options: dict[str, Any], backend: str) -> None:
    model, x = blocks(1), torch.randn(3, 64)
    parameters = put(model, method, **options).parameters()
    compiled = Compiled(model, backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(run(compiled, x, parameters), run(model, x, parameters), 4 * torch.finfo(torch.bfloat16).eps)
    assert (compiled.graphs, compiled.breaks) == (1, 0)


@each_method()
def test_two_adapters_and_switching(method: str, options: dict[str, Any]) -> None:
    """Each state is a graph of its own, which is found again."""
    model, x = blocks(1), torch.randn(3, 64)
    first, second = put(model, method, "first", **options), put(model, method, "second", **options)
    parameters = [*first.parameters(), *second.parameters()]
    compiled = Compiled(model)
    outputs = []
    for _ in range(2):
        assert_alike(run(compiled, x, parameters), run(model, x, parameters))
        with first.disabled():
            assert_alike(run(compiled, x, second.parameters()), run(model, x, second.parameters()))
            outputs.append(compiled(x))
            with second.disabled(), torch.no_grad():
                assert_alike([compiled(x)], [model(x)])
                outputs.append(compiled(x))
        outputs.append(compiled(x))
        assert (compiled.graphs, compiled.breaks) == (3, 0)
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(outputs))
    first.merge()
    with torch.no_grad():
        assert_alike([compiled(x)], [model(x)])
    assert compiled.breaks == 0


@each_method()
def test_other_batches_take_the_graphs_that_the_model_alone_takes(method: str, options: dict[str, Any]) -> None:
    numbers = []
    for adapted in (False, True):
        model = blocks(1)
        parameters = put(model, method, **options).parameters() if adapted else list(model.parameters())
        compiled = Compiled(model)
        for batch in (2, 3, 7, 11):
            x = torch.randn(batch, 64)
            assert_alike(run(compiled, x, parameters), run(model, x, parameters))
        numbers.append((compiled.graphs, compiled.breaks))
    assert numbers == [(2, 0), (2, 0)], "one for the first batch, one for all others"


@each_method()
def test_equal_blocks_share_a_graph_and_steps_make_no_other(method: str, options: dict[str, Any]) -> None:
    """More blocks than torch would recompile (torch._dynamo.config.recompile_limit), each compiled by itself."""
    number = torch._dynamo.config.recompile_limit + 4
    model, x = blocks(number), torch.randn(3, 64, requires_grad=True)
    adapter = put(model, method, **options)
    eager = deepcopy(model)
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model:
        block.compile(backend=counter)
    copies = [(model, adapter), (eager, tg.adapters(eager)["default"])]
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3) for _, one in copies]
    for _ in range(3):
        found = [run(one, x, own.parameters()) for one, own in copies]
        assert_alike(found[0], found[1], 1e-3)  # each step is made twice, and rounds on its own
        for optimizer in optimizers:
            optimizer.step()
        assert counter.frame_count == 1
    with torch.no_grad():
        for one, _ in copies:
            one.eval()
        assert_alike([model(x.detach())], [eager(x.detach())], 1e-3)
        assert counter.frame_count == 2
    assert not counters["graph_break"]


@each_method()
def test_an_eager_forward_between_makes_no_other_graph(method: str, options: dict[str, Any]) -> None:
    """A method may keep in eager what a compiled forward computes again (`Site.cached`)."""
    model, x = blocks(1).eval(), torch.randn(3, 64)
    put(model, method, **options)
    compiled = Compiled(model)
    with torch.no_grad():
        for _ in range(3):
            assert_alike([compiled(x)], [model(x)])
    assert (compiled.graphs, compiled.breaks) == (1, 0)


def test_ranks_that_change_are_followed() -> None:
    model, x = blocks(1), torch.randn(3, 64)
    adapter = put(model, "adalora", interval=1, epsilon=0.3)
    optimizer = adapter.optimizer("adamw", 0.01)
    compiled = Compiled(model)
    before = [tuple(parameter.shape) for parameter in adapter.parameters()]
    run(compiled, x, adapter.parameters())
    optimizer.step()
    adapter.step(optimizer, step=1)
    assert [tuple(parameter.shape) for parameter in adapter.parameters()] != before
    assert_alike(run(compiled, x, adapter.parameters()), run(model, x, adapter.parameters()))
    assert compiled.breaks == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@each_method()
def test_a_whole_llama_is_one_graph(method: str, options: dict[str, Any], backend: str) -> None:
    tokens = torch.randint(0, 67, (2, 9))
    model = build("llama")
    adapter = put(model, method, targets="@linear", **options)
    compiled = Compiled(model, backend)

    def through(forward: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: forward(input_ids=x).logits

    for train in (True, False):
        model.train(train)
        optimizer = adapter.optimizer("adamw", 1e-3)
        for _ in range(2):
            with nullcontext() if train else torch.no_grad():
                if train:
                    both = [run(through(one), tokens, adapter.parameters()) for one in (compiled, model)]
                else:
                    both = [[through(one)(tokens)] for one in (compiled, model)]
            assert_alike(both[0], both[1], 1e-4)
            optimizer.step()
        assert compiled.breaks == 0
        assert compiled.graphs == (1 if train else 2)
    explained = torch._dynamo.explain(model)(input_ids=tokens)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.slow
@each_method()
def test_inductor_gives_the_same_outputs_and_gradients(method: str, options: dict[str, Any]) -> None:
    model, x = blocks(2), torch.randn(3, 64)
    parameters = put(model, method, **options).parameters()
    compiled = Compiled(model, "inductor")
    assert_alike(run(compiled, x, parameters), run(model, x, parameters))
    assert (compiled.graphs, compiled.breaks) == (1, 0)
