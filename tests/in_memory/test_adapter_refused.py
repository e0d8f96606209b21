"""Training hooks of a method, adapters' names, and layers that would bypass an adapter."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchgraft as tg
from lora_model import dense, output, plain, put
from references import assert_same_state, state_of
from torchgraft.in_memory.apply import attach


class Shift:
    """A method that adds a vector to every column of the weight: h = base(x) + v·Σx. It records what it is asked."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.steps: list[Any] = []

    @tg.hookimpl
    def adapter_method(self) -> tg.Method:
        return tg.Method("shift", tg.Config, "adds a vector to every column", "none", kinds=frozenset({"Linear"}))

    @tg.hookimpl
    def adapter_init(self, site: tg.Site) -> dict[str, Tensor]:
        if site.name == self.refuse:
            raise RuntimeError("no shift for this one")
        return {"v": torch.full((site.out_features,), 0.5, dtype=torch.float64)}

    @tg.hookimpl
    def adapter_forward(self, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return base(x) + x.sum(-1, keepdim=True) * params["v"]

    @tg.hookimpl
    def adapter_merge(self, params: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        return weight + params["v"][:, None]

    @tg.hookimpl
    def adapter_unmerge(self, params: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        return weight - params["v"][:, None]

    @tg.hookimpl
    def adapter_param_groups(self, adapter: tg.Adapter, lr: float) -> list[dict[str, Any]]:
        return [{"params": adapter.parameters(), "lr": 7 * lr}]

    @tg.hookimpl
    def adapter_penalty(self, site: tg.Site, params: Mapping[str, Tensor]) -> Tensor | None:
        return None if site.name == "mlp.0" else params["v"].square().sum()

    @tg.hookimpl
    def adapter_step(self, adapter: tg.Adapter, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append((adapter.name, step, dict(metrics)))


@pytest.fixture
def shift() -> Iterator[Shift]:
    plugin = Shift()
    tg.registry().register(plugin, "shift")
    yield plugin
    tg.registry().unregister("shift")


def test_training_calls_the_hooks_of_the_method(shift: Shift) -> None:
    model = plain()
    base = deepcopy(model)
    adapter = tg.apply(model, "shift", ["q_proj", "mlp.0", "mlp.2"], name="s")
    (group,) = adapter.param_groups(lr=0.1)
    assert group["lr"] == pytest.approx(0.7)
    assert [id(p) for p in group["params"]] == [id(p) for p in adapter.parameters()]
    penalty = adapter.penalty()
    torch.testing.assert_close(penalty.detach(), torch.tensor(0.25 * (8 + 8)), check_dtype=False)
    penalty.backward()
    torch.testing.assert_close(adapter.parts["mlp.2"].v.grad, torch.ones(8).double())
    optimizer = torch.optim.SGD([group])
    adapter.step(optimizer, step=3, metrics={"loss": 2.0})
    adapter.step(optimizer, step=4)
    assert shift.steps == [("s", 3, {"loss": 2.0}), ("s", 4, {})]
    for name in ("attn.q_proj", "mlp.0", "mlp.2"):
        base.get_submodule(name).weight.data += 0.5
    torch.testing.assert_close(output(model), output(base))
    adapter.merge()
    torch.testing.assert_close(output(model), output(base))


def test_a_method_without_training_hooks_has_defaults() -> None:
    adapter = put(plain())
    (group,) = adapter.param_groups(lr=0.1, weight_decay=0.03)
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.1, 0.03, len(adapter.parameters()))
    adapter.step(torch.optim.SGD([group]), step=1)
    assert adapter.penalty().item() == 0


def test_a_failure_on_one_layer_leaves_the_model_unchanged(shift: Shift) -> None:
    model = plain()
    before = state_of(model), [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()], set(vars(model))
    shift.refuse = "mlp.0"
    with pytest.raises(RuntimeError, match="no shift for this one"):
        tg.apply(model, "shift", "@linear")
    with pytest.raises(tg.AttachError, match=r"embed: shift does not work on Embedding layers, only on Linear"):
        tg.apply(model, "shift", ["q_proj", "embed"])
    assert tg.adapters(model) == {}
    assert_same_state(before[0], model.state_dict())
    after = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()], set(vars(model))
    assert before[1:] == after


@pytest.mark.parametrize("name", ["lora", "weight", "default", "adapters", "module", "A", "1"])
def test_provoking_names_work(name: str) -> None:
    model = plain()
    base = deepcopy(model)
    adapter = put(model, name, also_train=["head"])
    torch.testing.assert_close(output(pickle.loads(pickle.dumps(model))), output(dense(base, adapter)))
    adapter.detach()
    assert_same_state(model.state_dict(), base.state_dict())


@pytest.mark.parametrize("name", ["a.b", "forward", "keys", "", "training", "_modules", "weights.1"])
def test_names_that_torch_does_not_take_are_refused(name: str) -> None:
    model = plain()
    with pytest.raises(tg.AttachError, match="cannot be an adapter's name"):
        put(model, name)
    assert tg.adapters(model) == {}
    assert all(p.requires_grad for p in model.parameters())


class OwnForward(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's own name
        return 2 * F.embedding(input, self.weight)


def _replaced_forward() -> nn.Module:
    model = plain()
    model.head.forward = lambda x, old=model.head.forward: old(x)
    return model


def _own_forward() -> nn.Module:
    model = plain()
    model.embed = OwnForward(11, 6)
    return model


def _parametrized() -> nn.Module:
    model = plain()
    nn.utils.parametrizations.weight_norm(model.mlp[0])
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "forward on the instance": (_replaced_forward, "head", "head has a forward that was replaced on the instance"),
    "class with its own forward": (_own_forward, "embed", "embed is a OwnForward, whose forward is its own and not Embedding's"),
    "parametrization": (_parametrized, "mlp.0", r"mlp\.0.* has a weight that is computed, not stored"),
    "projection of an attention": (lambda: encoder(), "out_proj", "out_proj is bypassed: a MultiheadAttention reads its weight"),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4)), "0", "0 has max_norm"),
    "quantized": (lambda: nn.Sequential(nn.Linear(4, 4).to(torch.float8_e4m3fn)), "0", "0 has a weight of type float8_e4m3fn"),
    "no such layer": (plain, "q_porj", "near names: .*q_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_would_pass_over_the_adapter_are_refused_with_the_reason(case: str) -> None:
    make, target, reason = REFUSED[case]
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(tg.SelectionError, match=reason):
        tg.apply(model, "lora", [target])
    assert [type(module) for module in model.modules()] == before
    assert tg.adapters(model) == {}


def test_an_adapter_that_could_not_be_attached_stays_empty() -> None:
    model = plain()
    before = state_of(model)
    chosen = tg.plan(model)
    adapter = tg.Adapter(model, "default", "lora", tg.LowRankConfig(), chosen)
    configs = {layer.name: tg.registry().method("lora").config() for layer in chosen.sites}

    def fail_at_the_last(site: tg.Site) -> Mapping[str, Tensor]:
        if site.name == chosen.sites[-1].name:
            raise RuntimeError("no tensors for this one")
        return {"A": torch.zeros(8, site.in_features), "B": torch.zeros(site.out_features, 8)}

    with pytest.raises(RuntimeError, match="no tensors for this one"):
        attach(adapter, configs, fail_at_the_last)
    assert not adapter.parts
    assert not adapter.copies
    assert not tg.adapters(model)
    assert_same_state(model.state_dict(), before)


def test_an_unknown_method_and_an_empty_selection_are_refused() -> None:
    with pytest.raises(tg.PluginError, match="no plugin 'loar'; near names: lora"):
        tg.apply(plain(), "loar")
    with pytest.raises(tg.SelectionError):
        tg.apply(plain(), "lora", ["q_proj", "!q_proj"])
    with pytest.raises(tg.AttachError, match="nothing is selected"):
        tg.apply(plain(), "lora", ["nowhere"], allow_unmatched=True)


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).double().eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_fused_encoder_does_not_pass_over_adapters(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: fused.append(1) or kernel(*args))
    model = encoder()
    base = deepcopy(model)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.arange(5) >= torch.tensor([[5], [3]]) if masked else None

    def run(model: nn.Module) -> Tensor:
        out = model(x, src_key_padding_mask=mask)
        return (out if mask is None else out[~mask]).detach()

    def run_fused(model: nn.Module) -> tuple[Tensor, bool]:
        fused.clear()
        with torch.no_grad():
            return run(model), bool(fused)

    assert run_fused(model)[1]
    adapter = put(model, targets=["linear1", "linear2"])
    expected = run(dense(base, adapter).train())  # training never takes the fused path
    assert (expected - run_fused(base)[0]).abs().max() > 0.1
    torch.testing.assert_close(run_fused(model), (expected, False))
    torch.testing.assert_close(run(model), expected)
    adapter.merge()
    torch.testing.assert_close(run_fused(model)[0], expected)
    adapter.detach()
    assert model.use_nested_tensor
    torch.testing.assert_close(run_fused(model), run_fused(base))
    assert run_fused(model)[1]
