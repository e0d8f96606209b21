"""LoRA+: the learning rate of every parameter, and what the optimizers make of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from models import Plain, perturb_

LR, DECAY = 0.01, 0.1
TOKENS = torch.tensor([[1, 5, 2, 9], [0, 3, 10, 7]])
SITES = ("embed", "conv", "attn.q_proj", "attn.out_proj", "mlp.0", "mlp.2", "head")
Rate = tuple[float, float]


def plain() -> Plain:
    torch.manual_seed(0)
    return Plain()


def rates(adapter: tg.Adapter, lr: float = LR, weight_decay: float = DECAY) -> dict[str, Rate]:
    """Parameter → (learning rate, weight decay), of an adapter whose parameters are in one group each."""
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    found: dict[str, Rate] = {}
    for group in adapter.param_groups(lr, weight_decay):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            found[name] = (group["lr"], group["weight_decay"])
    assert found.keys() == set(names.values())
    return found


def expected(a: float, b: float, embedding: float = 1.0, sites: tuple[str, ...] = SITES) -> dict[str, Rate]:
    return {
        f"{site}.{name}": (LR * (embedding if site == "embed" else scale), DECAY) for site in sites for name, scale in (("A", a), ("B", b))
    }


def assert_rates(got: dict[str, Rate], want: dict[str, Rate]) -> None:
    assert got.keys() == want.keys()
    assert {name: pytest.approx(rate) for name, rate in want.items()} == got


SCALES = {
    "the paper's defaults": ({}, (1, 16)),
    "B's ratio": ({"lr_scale_b": 4.0}, (1, 4)),
    "both": ({"lr_scale_a": 0.5, "lr_scale_b": 8.0}, (0.5, 8)),
    "the other way round": ({"lr_scale_a": 16.0, "lr_scale_b": 1.0}, (16, 1)),
    "an embedding's own": ({"lr_scale_embedding": 3.0}, (1, 16, 3)),
}


@pytest.mark.parametrize(("options", "want"), SCALES.values(), ids=SCALES)
def test_each_factor_has_its_own_rate(options: dict[str, Any], want: tuple[float, ...]) -> None:
    adapter = tg.apply(plain(), "loraplus", ["@all"], rank=2, **options)
    assert_rates(rates(adapter), expected(*want))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "qlora"])
def test_the_rates_are_options_of_every_low_rank_method(method: str) -> None:
    targets = ["attn.q_proj", "mlp.0"]
    adapter = tg.apply(plain(), method, targets, rank=2, lr_scale_a=0.5, lr_scale_b=8.0)
    magnitudes = {f"{site}.m": (LR, 0.0) for site in targets} if method == "dora" else {}
    assert_rates(rates(adapter), expected(0.5, 8, sites=tuple(targets)) | magnitudes)
    assert_rates(
        rates(tg.apply(plain(), method, targets, rank=2)),
        expected(1, 1, sites=tuple(targets)) | magnitudes,
    )


@pytest.mark.parametrize("square", [True, False])
def test_magnitudes_have_the_base_rate_and_no_weight_decay(square: bool) -> None:
    """Decay on them would shrink the frozen weight itself."""
    model = nn.Sequential(nn.Embedding(5, 5), nn.Linear(5, 5 if square else 1), nn.Conv1d(5, 1, 1))
    adapter = tg.apply(model, "dora", ["@all"], rank=1, lr_scale_b=16.0, lr_scale_embedding=2.0)
    scales = {"0.A": 2, "0.B": 2, "1.A": 1, "1.B": 16, "2.A": 1, "2.B": 16}
    magnitudes = dict.fromkeys(("0.m", "1.m", "2.m"), (LR, 0.0))
    assert_rates(rates(adapter), {name: (LR * scale, DECAY) for name, scale in scales.items()} | magnitudes)


def test_modules_trained_whole_have_the_base_rate() -> None:
    adapter = tg.apply(plain(), "loraplus", ["q_proj"], rank=2, also_train=["head", "norm"])
    whole = {f"{name}.{key}": (LR, DECAY) for name in ("head", "norm") for key in ("weight", "bias")}
    assert_rates(rates(adapter), expected(1, 16, sites=("attn.q_proj",)) | whole)


def test_rates_can_be_overridden_for_single_sites() -> None:
    overrides = {"mlp.*": {"lr_scale_b": 2.0}, "mlp.2": {"lr_scale_a": 3.0}, "embed": {"lr_scale_embedding": 7.0}}
    adapter = tg.apply(plain(), "loraplus", ["@all"], rank=2, overrides=overrides)
    own = {"mlp.0.B": (2 * LR, DECAY), "mlp.2.A": (3 * LR, DECAY), "mlp.2.B": (2 * LR, DECAY)}
    assert_rates(rates(adapter), expected(1, 16, 7) | own)


def test_the_frozen_start_of_pissa_is_in_no_group() -> None:
    adapter = tg.apply(plain(), "loraplus", ["mlp.0"], rank=2, init="pissa")
    assert {"A0", "B0"} <= adapter.parts["mlp.0"].tensors().keys()
    assert_rates(rates(adapter), expected(1, 16, sites=("mlp.0",)))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), "16"])
def test_a_rate_that_is_no_positive_number_is_refused(value: Any) -> None:
    with pytest.raises(tg.ConfigError, match="loraplus: lr_scale_b"):
        tg.apply(plain(), "loraplus", ["mlp.0"], lr_scale_b=value)


class Swapped:
    """LoRA whose names and shapes tell the wrong story: B is the first factor, A the second and E, a vector, part of the second."""

    @tg.hookimpl
    def adapter_method(self) -> tg.Method:
        return tg.Method("swapped", tg.LowRankConfig, "", "", roles={"B": "A", "A": "B", "E": "B", "lora_A": "magnitude"})

    @tg.hookimpl
    def adapter_init(self, site: tg.Site, config: tg.LowRankConfig) -> dict[str, Tensor]:
        first, second = torch.ones(config.rank, site.in_features), torch.zeros(site.out_features, config.rank)
        gate, other = torch.ones(site.out_features), torch.ones(2, 2)
        return {"B": first, "A": second, "E": gate, "lora_A": other, "lora_B": other.clone()}

    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return base(x) + params["E"] * site.project_out(site.project_in(x, params["B"]), params["A"])

    @tg.hookimpl
    def adapter_merge(self, params: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        return weight + params["E"][:, None] * (params["A"] @ params["B"])

    @tg.hookimpl
    def adapter_unmerge(self, params: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        return weight - params["E"][:, None] * (params["A"] @ params["B"])

    @tg.hookimpl
    def adapter_param_groups(self, adapter: tg.Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return tg.scaled_param_groups(adapter, lr, weight_decay)


@pytest.fixture
def swapped() -> Iterator[None]:
    tg.registry().register(Swapped(), "swapped")
    yield
    tg.registry().unregister("swapped")


@pytest.mark.usefixtures("swapped")
@pytest.mark.parametrize("width", [4, 6])
def test_rates_follow_the_roles_that_a_method_declares_not_names_or_shapes(width: int) -> None:
    adapter = tg.apply(nn.Sequential(nn.Linear(4, width)), "swapped", ["0"], rank=4, lr_scale_a=2.0, lr_scale_b=16.0)
    want = {"0.B": (2, DECAY), "0.A": (16, DECAY), "0.E": (16, DECAY), "0.lora_A": (1, 0.0), "0.lora_B": (1, DECAY)}
    assert_rates(rates(adapter), {name: (LR * scale, decay) for name, (scale, decay) in want.items()})


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, float]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
}


def train(adapter: tg.Adapter, optimizer: torch.optim.Optimizer, steps: int = 20) -> list[float]:
    generator, losses = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        tokens = torch.randint(11, (4, 6), generator=generator)
        loss = (adapter.model(tokens) - tokens.unsqueeze(-1) / 11).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_at_scales_of_one_it_is_lora_step_for_step(make: Callable[..., Any], options: dict[str, float]) -> None:
    """Against LoRA with the optimizer that one would write for it: one group, one rate, one weight decay."""
    targets = {"targets": ["@all"], "rank": 3, "also_train": ["norm"], "seed": 4}
    lora, plus = tg.apply(plain(), "lora", **targets), tg.apply(plain(), "loraplus", lr_scale_b=1.0, **targets)
    theirs = train(lora, make(lora.parameters(), lr=LR, weight_decay=DECAY, **options))
    start = [parameter.detach().clone() for parameter in plus.parameters()]
    ours = train(plus, make(plus.param_groups(LR, DECAY), **options))
    assert ours == theirs
    assert ours[-1] < 0.9 * ours[0]
    for one, other, before in zip(plus.parameters(), lora.parameters(), start, strict=True):
        assert one.equal(other)
        assert not one.equal(before)


def test_at_other_scales_it_is_not_lora() -> None:
    lora, plus = (tg.apply(plain(), method, ["@linear"], rank=3) for method in ("lora", "loraplus"))
    assert train(lora, torch.optim.SGD(lora.param_groups(LR))) != train(plus, torch.optim.SGD(plus.param_groups(LR)))


@pytest.mark.parametrize(("width", "out"), [(6, 9), (7, 7)])
def test_one_step_of_sgd_is_the_formula_s(width: int, out: int) -> None:
    """dB = s·dYᵀ·(X·Aᵀ), dA = s·Bᵀ·dYᵀ·X, by hand in float64; then P ← P - μ·(dP + λ·P) with each factor's own μ."""
    torch.manual_seed(0)
    model, x, target = nn.Sequential(nn.Linear(width, out)).double(), torch.randn(5, width).double(), torch.randn(5, out).double()
    adapter = tg.apply(model, "loraplus", ["0"], rank=2, alpha=3.0, dtype="float64", lr_scale_a=0.5, lr_scale_b=12.0)
    perturb_(adapter.parameters())
    a, b = (adapter.parts["0"].tensors()[name].detach().clone() for name in "AB")
    scale = 3.0 / 2
    error = x @ model[0].weight.T + model[0].bias + scale * x @ a.T @ b.T - target
    want_a = a - 0.5 * LR * (scale * b.T @ error.T @ x + DECAY * a)
    want_b = b - 12.0 * LR * (scale * error.T @ x @ a.T + DECAY * b)
    optimizer = torch.optim.SGD(adapter.param_groups(LR, DECAY))
    (0.5 * (model(x) - target).square().sum()).backward()
    optimizer.step()
    torch.testing.assert_close(adapter.parts["0"].A.detach(), want_a.detach())
    torch.testing.assert_close(adapter.parts["0"].B.detach(), want_b.detach())


def test_a_schedule_keeps_the_ratio() -> None:
    adapter = tg.apply(plain(), "loraplus", ["q_proj"], rank=2)
    optimizer = torch.optim.SGD(adapter.param_groups(LR))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    low, high = sorted(group["lr"] for group in optimizer.param_groups)
    assert low < 0.5 * LR
    assert high == pytest.approx(16 * low)


def trained_and_saved(directory: Path) -> tuple[Plain, tg.Adapter]:
    model = plain()
    adapter = tg.apply(model, "loraplus", ["@all"], rank=2, lr_scale_b=8.0, overrides={"head": {"lr_scale_a": 2.0}})
    perturb_(adapter.parameters())
    adapter.save(directory)
    return model.eval(), adapter


def test_peft_reads_it_as_plain_lora(tmp_path: Path) -> None:
    model, _ = trained_and_saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_rslora"], config.get("use_dora", False)) == ("LORA", False, False)
    theirs = peft.PeftModel.from_pretrained(plain().eval(), tmp_path)(TOKENS)
    torch.testing.assert_close(theirs, model(TOKENS), rtol=1e-5, atol=1e-5)
    assert (theirs - plain().eval()(TOKENS)).abs().max() > 0.1


@pytest.mark.parametrize("native", [True, False], ids=["with our record", "as plain PEFT"])
def test_our_record_keeps_the_method_and_its_rates(native: bool, tmp_path: Path) -> None:
    model, adapter = trained_and_saved(tmp_path)
    if not native:
        (tmp_path / "torchgraft.json").unlink()
    again = plain().eval()
    loaded = tg.load(again, tmp_path)
    assert again(TOKENS).equal(model(TOKENS))
    assert loaded.method == ("loraplus" if native else "lora")
    assert_rates(rates(loaded), expected(1, 8) | {"head.A": (2 * LR, DECAY)} if native else expected(1, 1))
    assert native == (loaded.config == adapter.config)


def test_a_copy_of_the_model_has_groups_of_its_own_parameters() -> None:
    model = plain()
    adapter = tg.apply(model, "loraplus", ["@all"], rank=2)
    copy = tg.adapters(deepcopy(model))["default"]
    assert_rates(rates(copy), rates(adapter))
