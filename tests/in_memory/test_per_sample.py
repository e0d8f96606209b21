"""Several adapters in one batch, against each sample sent alone through the one adapter that is named for it."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import torchgraft as tg
from models import Plain, build, perturb_

TOKENS = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(0))
NAMES = ["lora", None, "dora", "lora", "ada"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3, "dropout": 0.1},
    "dora": {"method": "dora", "rank": 2},
    "ada": {"method": "adalora", "rank": 4},
}


def several(model: nn.Module, targets: str = "@all", few: Sequence[str] = ("@attention", "head")) -> nn.Module:
    """`model` with an adapter of each of three methods, the last on `few` layers, in eval."""
    dtype = "float64" if next(model.parameters()).dtype == torch.float64 else "float32"
    for seed, (name, options) in enumerate(METHODS.items()):
        adapter = tg.apply(model, name=name, targets=few if name == "ada" else targets, dtype=dtype, **options)
        perturb_(adapter.parameters(), seed=seed)
    return model.eval()


def alone(model: nn.Module, x: Tensor, name: str | None) -> Tensor:
    tg.activate(model, *([] if name is None else [name]))
    found: Tensor = model(x)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_each_sample_goes_through_its_own_adapter(dtype: torch.dtype) -> None:
    model = several(Plain().to(dtype))
    with tg.per_sample(model, NAMES):
        got = model(TOKENS)
    tolerance = 20 * torch.finfo(dtype).eps
    for sample, name in enumerate(NAMES):
        want = alone(model, TOKENS[sample : sample + 1], name)
        torch.testing.assert_close(got[sample : sample + 1], want, rtol=tolerance, atol=tolerance * float(want.abs().max().detach()))
    spread = [alone(model, TOKENS[:1], name) for name in dict.fromkeys(NAMES)]
    assert all((one - other).abs().max() > 0.05 for one in spread for other in spread if one is not other)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*METHODS, None]), min_size=1, max_size=9))
def test_any_order_of_adapters(names: list[str | None]) -> None:
    torch.manual_seed(0)
    model = several(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4, bias=False)).double(), "*", ["0"])
    x = torch.randn(len(names), 3, 6, dtype=torch.float64)
    with tg.per_sample(model, names):
        got = model(x)
    for sample, name in enumerate(names):
        torch.testing.assert_close(got[sample], alone(model, x[sample], name))


def test_gradients_reach_each_adapter_from_its_own_samples() -> None:
    model = several(Plain().double())
    adapters = tg.adapters(model)
    with tg.per_sample(model, NAMES):
        model(TOKENS).square().sum().backward()
    got = {name: [parameter.grad for parameter in adapter.parameters()] for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        model.zero_grad()
        rows = [sample for sample, own in enumerate(NAMES) if own == name]
        alone(model, TOKENS[rows], name).square().sum().backward()
        for found, parameter in zip(got[name], adapter.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad)


def test_the_layer_runs_once_and_each_adapter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = several(nn.Sequential(nn.Linear(6, 9)), "*", ["0"])
    runs: Counter[str] = Counter()
    real = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        runs["layer"] += 1
        return real(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    for name, adapter in tg.adapters(model).items():
        part = adapter.parts["0"]
        forward = part._forward

        def noted(*args: Any, name: str = name, forward: Any = forward) -> Any:
            runs[name] += 1
            return forward(*args)

        part._forward = noted
    names = ["dora", "lora", None] * 30
    with tg.per_sample(model, names):
        model(torch.randn(90, 6))
    assert runs == {"layer": 1, "dora": 1, "lora": 1}


def test_a_module_that_is_trained_whole_runs_for_its_own_samples() -> None:
    torch.manual_seed(0)
    model = Plain().double()
    for name in ("one", "two"):
        adapter = tg.apply(model, "lora", "mlp.0", name=name, also_train="head", dtype="float64")
        perturb_(adapter.parameters(), seed=len(name))
        adapter.copies["head"].module.bias.data.add_(len(tg.adapters(model)))
    with tg.per_sample(model, ["two", None, "one", "two", "one"]):
        got = model(TOKENS)
    for sample, name in enumerate(["two", None, "one", "two", "one"]):
        torch.testing.assert_close(got[sample], alone(model, TOKENS[sample : sample + 1], name)[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(beams: int) -> None:
    model = several(build("llama"), "@linear", ["@mlp"])
    names = ["dora", "lora", None]
    prompts = torch.randint(3, 67, (3, 5), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with tg.per_sample(model, names):
        got = model.generate(prompts, **options)
    wants = []
    for sample, name in enumerate(names):
        tg.activate(model, *([] if name is None else [name]))
        wants.append(model.generate(prompts[sample : sample + 1], **options)[0])
    assert torch.equal(got, torch.stack(wants))
    assert not torch.equal(wants[0][5:], wants[2][5:])


def test_what_was_active_is_active_again_also_after_an_error() -> None:
    model = several(Plain())
    tg.activate(model, "ada")
    before = model(TOKENS)
    with (
        pytest.raises(tg.AttachError, match=r"embed: the first dimension of its input is 4, but adapter_names has 5 entries"),
        tg.per_sample(model, NAMES),
    ):
        model(TOKENS[:4])
    assert torch.equal(model(TOKENS), before)
    with tg.per_sample(model, NAMES), tg.per_sample(model, [None] * 5):
        inner = model(TOKENS)
    tg.activate(model)
    assert torch.equal(inner, model(TOKENS))


def test_names_and_merged_adapters_are_refused() -> None:
    model = several(Plain())
    with pytest.raises(tg.AttachError, match="no adapter 'loar'; near names: lora, dora"), tg.per_sample(model, ["loar"]):
        pass
    tg.activate(model, "lora")
    tg.adapters(model)["lora"].merge()
    with pytest.raises(tg.MergeError, match="merged"), tg.per_sample(model, [None]):
        pass


def test_other_models_in_the_block_are_left_alone() -> None:
    model, other = several(Plain()), several(Plain())
    want = other(TOKENS)
    with tg.per_sample(model, NAMES):
        assert torch.equal(other(TOKENS), want)
        copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy(TOKENS), model(TOKENS)), "it is not in the block"
    with tg.per_sample(copy, NAMES), tg.per_sample(model, NAMES):
        assert torch.equal(copy(TOKENS), model(TOKENS))


def test_compiles_without_a_graph_break() -> None:
    model = several(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), "*", ["0"])
    x = torch.randn(4, 3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with tg.per_sample(model, ["lora", "dora", None, "lora"]), torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_in_the_block_adapters_stay_as_they_are(tmp_path: Path) -> None:
    model = several(Plain())
    before = model(TOKENS)
    lora = tg.adapters(model)["lora"]
    calls: dict[str, Callable[[], Any]] = {
        "attached": lambda: tg.apply(model, "lora", "mlp.0", name="new"),
        "merged": lora.merge,
        "unmerged": lora.unmerge,
        "detached": lora.detach,
        "saved": lambda: lora.save(tmp_path / "saved"),
    }
    for what, call in calls.items():
        with tg.per_sample(model, NAMES), pytest.raises(tg.AttachError, match=f"within per_sample no adapter can be {what}; leave"):
            call()
    assert not any(tmp_path.iterdir())
    assert all("_graft_routes" not in module.__dict__ for module in model.modules())
    assert torch.equal(model(TOKENS), before)


def test_names_may_come_from_a_generator_and_not_be_missing() -> None:
    model = several(Plain())
    with tg.per_sample(model, NAMES):
        want = model(TOKENS)
    with tg.per_sample(model, (name for name in NAMES)):  # type: ignore[arg-type]
        assert torch.equal(model(TOKENS), want)
    with pytest.raises(tg.AttachError, match="adapter_names is empty; give one for each sample"), tg.per_sample(model, []):
        pass


class Normed(nn.Module):
    """A linear layer before a norm that learns from what it sees, and, `twice`, a module that returns a tuple."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 4), Twice() if twice else nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.linear(x))


class Twice(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_module_that_is_trained_whole_leaves_the_original_the_other_samples() -> None:
    torch.manual_seed(0)
    model = Normed().train()
    adapter = tg.apply(model, "lora", "linear", rank=2, also_train="norm", name="one")
    tg.apply(model, "lora", "linear", rank=2, name="two")
    copy, x = adapter.copies["norm"].module, torch.randn(7, 6)
    names = ["two", "one", None, "one", "two", "one", "one"]
    with tg.per_sample(model, names):
        model(x)
    ones = torch.tensor([name == "one" for name in names])
    y = nn.Linear.forward(model.linear, x)  # B is zero
    assert model.norm.num_batches_tracked == copy.num_batches_tracked == 1
    torch.testing.assert_close(model.norm.running_mean, 0.1 * y[~ones].mean(0))
    torch.testing.assert_close(copy.running_mean, 0.1 * y[ones].mean(0))
    with tg.per_sample(model, ["one"] * 7):
        model(x)
    assert (model.norm.num_batches_tracked, copy.num_batches_tracked) == (1, 2)


def test_a_module_that_returns_something_else_is_refused() -> None:
    model = Normed(twice=True)
    tg.apply(model, "lora", "linear", rank=2, also_train="norm", name="one")
    for names in (["one"] * 3, ["one", None, "one"]):
        with pytest.raises(tg.AttachError, match="norm: per_sample works on modules that return one tensor"), tg.per_sample(model, names):
            model(torch.randn(3, 6))
