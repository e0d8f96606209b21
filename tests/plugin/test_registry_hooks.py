"""Hooks through the registry: observers and wrappers, arguments left out, shapes, and kinds of layer from plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from models import perturb_
from torchgraft.layers.layer import Layer
from torchgraft.layers.plan import site_of

SITE = site_of(Layer("layer", "Linear", (5, 3), "float32", 15, 60))
PARAMS = {"v": torch.tensor([1.0, -2.0, 0.5, 3.0, 7.0])}
WEIGHT = torch.arange(15.0).reshape(5, 3)


class Shift:
    """A method that adds a vector to every column of the weight: h = base(x) + v·Σx."""

    def __init__(self, name: str, sign: float = 1.0) -> None:
        self.name, self.sign = name, sign
        self.calls: list[str] = []

    @tg.hookimpl
    def adapter_method(self) -> tg.Method:
        return tg.Method(self.name, tg.Config, "", "")

    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        self.calls.append("init")
        return {"v": site.weight().new_empty(site.out_features)}

    @tg.hookimpl
    def adapter_forward(self, x: Tensor, params: dict[str, Tensor], base: Callable[[Tensor], Tensor]) -> Tensor:
        self.calls.append("forward")
        return base(x) + self.sign * x.sum(-1, keepdim=True) * params["v"]

    @tg.hookimpl
    def adapter_merge(self, rows: slice, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        self.calls.append("merge")
        return weight + self.sign * params["v"][rows, None]

    @tg.hookimpl
    def adapter_unmerge(self, params: dict[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
        self.calls.append("unmerge")
        return weight - self.sign * params["v"][rows, None]


class Observer:
    """No method: it sees the calls of all methods, and leaves them alone."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> None:
        self.calls.append("init")

    @tg.hookimpl
    def adapter_forward(self, x: Tensor) -> None:
        self.calls.append("forward")

    @tg.hookimpl
    def adapter_merge(self) -> None:
        self.calls.append("merge")


class Doubler:
    """A wrapper: it doubles what the methods return."""

    @tg.hookimpl(wrapper=True)
    def adapter_forward(self, site: tg.Site) -> Any:
        return 2 * (yield)

    @tg.hookimpl(wrapper=True)
    def adapter_merge(self) -> Any:
        return 2 * (yield)


def use(hooks: Any) -> tuple[Tensor, Tensor]:
    """init, forward and merge of the Shift methods; x is all ones and the base gives zeros."""
    assert hooks.init(SITE_WITH_WEIGHT, tg.Config(), torch.Generator())["v"].shape == (5,)
    forward = hooks.forward(SITE, tg.Config(), PARAMS, torch.ones(2, 3), lambda x: x.new_zeros(2, 5))
    return forward, hooks.merge(tg.Config(), PARAMS, WEIGHT[1:3], slice(1, 3))


SITE_WITH_WEIGHT = site_of(Layer("layer", "Linear", (5, 3), "float32", 15, 60), read=lambda: WEIGHT)
FORWARD = 3 * PARAMS["v"].expand(2, 5)
MERGED = WEIGHT[1:3] + torch.tensor([[-2.0], [0.5]])


@pytest.mark.parametrize("late", [True, False], ids=["observer after the method", "observer before the method"])
def test_observers_and_wrappers_see_every_call_and_other_methods_none(late: bool) -> None:
    registry, one, two, observer = tg.Registry([]), Shift("one"), Shift("two", sign=-1.0), Observer()
    for name, plugin in sorted({"one": one, "two": two, "watch": observer}.items(), key=lambda item: (item[0] == "watch") == late):
        registry.register(plugin, name)
    torch.testing.assert_close(use(registry.hooks("one")), (FORWARD, MERGED))
    assert (one.calls, two.calls) == (["init", "forward", "merge"], [])
    assert observer.calls == ["init", "forward", "merge"]
    registry.register(Doubler(), "double")
    torch.testing.assert_close(use(registry.hooks("one")), (2 * FORWARD, 2 * MERGED))
    registry.unregister("double")
    registry.unregister("watch")
    torch.testing.assert_close(use(registry.hooks("two")), (-FORWARD, 2 * WEIGHT[1:3] - MERGED))
    with pytest.raises(tg.PluginError, match="no plugin 'watch'"):
        registry.method("watch")


def test_a_plugin_without_a_method_is_no_method() -> None:
    registry = tg.Registry([])
    registry.register(Observer(), "watch")
    with pytest.raises(tg.PluginError, match="provides no method: it has no adapter_method hook"):
        registry.method("watch")
    with pytest.raises(tg.PluginError, match=r"the name 'watch'.*is taken by watch"):
        registry.register(Shift("watch"), "watch")


def test_a_method_that_is_registered_later_takes_over_no_calls() -> None:
    registry, one = tg.Registry([]), Shift("one")
    registry.register(one, "one")
    hooks = registry.hooks("one")
    registry.register(Shift("two", sign=-1.0), "two")
    torch.testing.assert_close(use(hooks), (FORWARD, MERGED))


class Whole(Shift):
    @tg.hookimpl
    def adapter_merge(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        return weight + params["v"][:, None]


def test_hooks_may_leave_out_arguments() -> None:
    registry = tg.Registry([])
    registry.register(Whole("whole"), "whole")
    registry.register(Shift("blocks"), "blocks")
    whole, blocks = registry.hooks("whole"), registry.hooks("blocks")
    torch.testing.assert_close(whole.forward(SITE, None, PARAMS, torch.ones(2, 3), lambda x: x.new_zeros(2, 5)), FORWARD)
    torch.testing.assert_close(whole.merge(None, PARAMS, WEIGHT), WEIGHT + PARAMS["v"][:, None])
    torch.testing.assert_close(whole.unmerge(None, PARAMS, WEIGHT), WEIGHT - PARAMS["v"][:, None])
    assert (whole.merges_rows, blocks.merges_rows) == (False, True)


def test_shapes_are_found_by_running_init_on_a_weight_without_values() -> None:
    registry, devices = tg.Registry([]), []

    class Watched(Shift):
        @tg.hookimpl
        def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
            devices.append(site.weight().device.type)
            return {"v": site.weight().new_empty(2, site.in_features)}

    registry.register(Watched("one"), "one")
    assert registry.hooks("one").shapes(SITE, tg.Config()) == {"v": (2, 3)}
    assert devices == ["meta"]


class InOut(nn.Module):
    """A linear layer of somebody else's, with the weight stored (in, out)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class InOutKind(tg.Kind):
    name = "InOut"

    def module_class(self) -> type[nn.Module]:
        return InOut

    def canonical_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[1], shape[0])

    def to_canonical(self, weight: Tensor) -> Tensor:
        return weight.t()

    def from_canonical(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.t()

    def project_in(self, module: nn.Module, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        return x @ a.t()

    def project_out(self, module: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        return h @ b.t()


class Extra:
    @tg.hookimpl
    def layer_kind(self) -> tg.Kind:
        return InOutKind()


class Liar(Shift):
    @tg.hookimpl
    def adapter_shapes(self, site: tg.Site) -> dict[str, tuple[int, ...]]:
        return {"v": (site.out_features + 1,)}


@pytest.fixture
def register() -> Iterator[Callable[[object, str], None]]:
    """Register with the registry that models use, until the end of the test."""
    names: list[str] = []

    def add(plugin: object, name: str) -> None:
        tg.registry().register(plugin, name)
        names.append(name)

    yield add
    for name in names:
        tg.registry().unregister(name)


@pytest.mark.parametrize(("width", "out"), [(6, 9), (7, 7)])
def test_a_kind_from_a_plugin_gets_every_method(width: int, out: int, register: Callable[[object, str], None]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(InOut(width, out)), torch.randn(4, width)
    with pytest.raises(tg.SelectionError, match="can be adapted"):
        tg.apply(model, "lora", ["0"])
    register(Extra(), "extra")
    original = deepcopy(model)
    adapter = tg.apply(model, "lora", ["0"], rank=2, alpha=3.0)
    assert [(site.kind.name, site.out_features, site.in_features) for site in adapter.sites] == [("InOut", out, width)]
    perturb_(adapter.parameters())
    a, b = (dict(adapter.named_parameters())[f"0.{key}"].detach().double() for key in "AB")
    weight = original[0].weight.detach().double() + 3 / 2 * (b @ a).t()
    torch.testing.assert_close(model(x).double(), x.double() @ weight, atol=1e-5, rtol=1e-5)
    adapter.merge()
    torch.testing.assert_close(model[0].weight.double(), weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(x).double(), x.double() @ weight, atol=1e-5, rtol=1e-5)
    adapter.detach()
    assert torch.equal(model[0].weight, original[0].weight)
    assert type(model[0]) is InOut


def test_shapes_that_contradict_init_are_refused(register: Callable[[object, str], None]) -> None:
    register(Liar("liar"), "liar")
    model = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(tg.AttachError, match=r"0: the plugin 'liar' created tensors of shapes .*\(5,\).* returns .*\(6,\)"):
        tg.apply(model, "liar", ["0"])
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


class Returning:
    @tg.hookimpl
    def adapter_merge(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_an_observer_that_returns_something_is_an_error_and_not_the_result() -> None:
    registry = tg.Registry([])
    registry.register(Shift("one"), "one")
    registry.register(Returning(), "watch")
    with pytest.raises(tg.PluginError, match=r"the plugin watch .*: adapter_merge returned something.*use wrapper=True"):
        registry.hooks("one").merge(None, PARAMS, WEIGHT)


@dataclass
class NotHashable:
    """A dataclass that compares by value has no hash."""

    width: int = 3

    @tg.hookimpl
    def adapter_merge(self) -> None:
        return None


class WrapsTheKinds:
    @tg.hookimpl(wrapper=True)
    def layer_kind(self) -> Any:
        return (yield)


@pytest.mark.parametrize(
    ("plugin", "says"), [(NotHashable(), "a dataclass needs eq=False"), (WrapsTheKinds(), "it wraps layer_kind")], ids=["hash", "wraps"]
)
def test_a_plugin_that_would_break_others_is_refused(plugin: object, says: str) -> None:
    registry = tg.Registry([])
    registry.register(Shift("one"), "one")
    with pytest.raises(tg.PluginError, match=says):
        registry.register(plugin, "bad")
    torch.testing.assert_close(use(registry.hooks("one")), (FORWARD, MERGED))


def test_a_merge_of_another_shape_is_refused_where_it_would_be_broadcast(register: Callable[[object, str], None]) -> None:
    class Narrow(Shift):
        @tg.hookimpl
        def adapter_merge(self, weight: Tensor) -> Tensor:
            return weight[:1]

    register(Narrow("narrow"), "narrow")
    model = nn.Sequential(nn.Linear(3, 5))
    before = model[0].weight.detach().clone()
    adapter = tg.apply(model, "narrow", ["0"])
    with pytest.raises(tg.PluginError, match=r"narrow: adapter_merge returned a tensor of shape \[1, 3\], where \[5, 3\] is expected"):
        adapter.merge()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([torch.ones(2)], "not a dict of tensors"),
        ({"a.b": torch.ones(2)}, "names without a dot"),
        ({"v": torch.ones(2, dtype=torch.int64)}, "v of torch.int64, which cannot be trained: list it in Method.buffers"),
    ],
)
def test_what_init_may_not_return_is_refused(tensors: Any, says: str, register: Callable[[object, str], None]) -> None:
    class Odd(Shift):
        @tg.hookimpl
        def adapter_init(self) -> Any:
            return tensors

    register(Odd("odd"), "odd")
    with pytest.raises(tg.PluginError, match=f"odd: adapter_init .*{says}"):
        tg.apply(nn.Sequential(nn.Linear(3, 5)), "odd", ["0"])


class Permuted:
    """W' = W with its rows in another order, which is kept as integers."""

    @tg.hookimpl
    def adapter_method(self) -> tg.Method:
        return tg.Method("permuted", tg.Config, "", "", buffers=frozenset({"order"}))

    @tg.hookimpl
    def adapter_init(self, site: tg.Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {"order": torch.randperm(site.out_features, generator=generator), "gain": torch.ones(1)}

    @tg.hookimpl
    def adapter_forward(self, params: dict[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return params["gain"] * base(x)[..., params["order"]]

    @tg.hookimpl
    def adapter_merge(self, params: dict[str, Tensor], weight: Tensor) -> Tensor:
        return params["gain"] * weight[params["order"]]

    @tg.hookimpl
    def adapter_unmerge(self, params: dict[str, Tensor], weight: Tensor) -> Tensor:
        return (weight / params["gain"])[params["order"].argsort()]


def test_a_buffer_of_integers_is_saved_loaded_and_merged(register: Callable[[object, str], None], tmp_path: Path) -> None:
    register(Permuted(), "permuted")
    model, x = nn.Sequential(nn.Linear(3, 5, bias=False)), torch.randn(2, 3)
    base = deepcopy(model)
    adapter = tg.apply(model, "permuted", ["0"])
    adapter.save(tmp_path)
    again = tg.load(base, tmp_path)
    torch.testing.assert_close(base(x), model(x), rtol=0, atol=0)
    assert again.parts["0"].tensors()["order"].dtype == torch.int64
    expected = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), expected)


def test_a_role_that_there_is_not_is_refused() -> None:
    with pytest.raises(tg.PluginError, match=r"m: roles=.*a role can be A, B, magnitude"):
        tg.Method("m", tg.Config, "", "", roles={"g": cast(Any, "scale")})


@pytest.mark.parametrize("params", [lambda parameters: iter(parameters), lambda parameters: parameters[0]], ids=["generator", "tensor"])
def test_groups_can_hold_whatever_torch_takes(params: Any, register: Callable[[object, str], None]) -> None:
    class Grouped(Shift):
        @tg.hookimpl
        def adapter_param_groups(self, adapter: tg.Adapter, lr: float) -> list[dict[str, Any]]:
            return [{"params": params(adapter.parameters()), "lr": lr}]

    register(Grouped("grouped"), "grouped")
    adapter = tg.apply(nn.Sequential(nn.Linear(3, 5)), "grouped", ["0"])
    assert [group["params"] for group in torch.optim.SGD(adapter.param_groups(0.1)).param_groups] == [adapter.parameters()]


@pytest.mark.parametrize("name", ["shared", "params", "config", "training"])
def test_a_tensor_that_would_hide_a_member_is_refused(name: str, register: Callable[[object, str], None]) -> None:
    class Hiding(Shift):
        @tg.hookimpl
        def adapter_init(self) -> dict[str, Tensor]:
            return {name: torch.ones(2)}

    register(Hiding("hiding"), "hiding")
    with pytest.raises(tg.PluginError, match=f"0: hiding cannot .*'{name}'"):
        tg.apply(nn.Sequential(nn.Linear(3, 5)), "hiding", ["0"])
