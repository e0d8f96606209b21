"""AdaLoRA's budget, against a transcription of the paper (arXiv 2303.10512) in float64; and training with either allocator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import torchgraft as tg
from models import Plain, perturb_
from moments import MEANS, OPTIMIZERS, SQUARES
from torchgraft_plugins.adalora.budget import budget
from torchgraft_plugins.adalora.config import AdaloraConfig

TOKENS = torch.arange(44).reshape(4, 11) * 7 % 11
BUDGET: dict[str, Any] = {"allocator": "budget", "rank": 4, "total_steps": 20}


def exact_budget(t: int, start: int, end: int, total: int, warmup: int, final: int) -> Fraction:
    """b(t) of the paper before it is rounded down, with t - t_i for its t - t_i - t_f."""
    if t < warmup:
        return Fraction(start)
    if t >= total - final:
        return Fraction(end)
    return end + (start - end) * (1 - Fraction(t - warmup, total - warmup - final)) ** 3


@given(st.data())
def test_the_budget_is_the_paper_s_and_falls_from_all_to_the_target(data: st.DataObject) -> None:
    total = data.draw(st.integers(2, 300))
    final = data.draw(st.integers(1, total - 1))
    warmup = data.draw(st.integers(0, total - final - 1))
    rank, sites = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 30))
    target = data.draw(st.integers(0, rank))
    config = AdaloraConfig(allocator="budget", rank=rank, target_rank=target, total_steps=total, warmup_steps=warmup, final_steps=final)
    start, end = rank * sites, target * sites
    found = [budget(config, t, sites, start) for t in range(total + 3)]
    for t, b in enumerate(found):
        exact = exact_budget(t, start, end, total, warmup, final)
        assert b in (floor(exact - Fraction(1, 10**9)), floor(exact + Fraction(1, 10**9)))
    assert found == sorted(found, reverse=True)
    assert found[0] == found[warmup] == start
    assert set(found[total - final :]) == {end}


@dataclass
class Paper:
    """The allocator in float64, masks and all: triplets that are not kept have w and ∇w of 0."""

    beta1: float
    beta2: float
    least: dict[str, int]
    masks: dict[str, Tensor]
    average: dict[str, Tensor] = field(default_factory=dict)
    uncertainty: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[tuple[str, int], float] = field(default_factory=dict)

    def observe(self, site: str, name: str, weight: Tensor, gradient: Tensor) -> None:
        """With w and ∇w as rows of triplets."""
        current = (weight.double() * gradient.double()).abs()
        key = f"{site}.{name}"
        mean = self.beta1 * self.average.get(key, torch.zeros_like(current)) + (1 - self.beta1) * current
        spread = self.beta2 * self.uncertainty.get(key, torch.zeros_like(current)) + (1 - self.beta2) * (current - mean).abs()
        self.average[key], self.uncertainty[key] = mean, spread

    def allocate(self, b: int) -> None:
        scores = []
        for site in self.masks:
            s = {name: self.average[f"{site}.{name}"] * self.uncertainty[f"{site}.{name}"] for name in "AEB"}
            of_site = s["E"][:, 0] + s["B"].sum(1) / s["B"].shape[1] + s["A"].sum(1) / s["A"].shape[1]
            scores += [(value, site, i) for i, value in enumerate(of_site.tolist())]
        scores.sort(reverse=True)
        self.scores = {(site, i): value for value, site, i in scores}
        kept = [entry for site, least in self.least.items() for entry in [e for e in scores if e[1] == site][:least]]
        kept += [entry for entry in scores if entry not in kept][: max(0, b - len(kept))]
        self.masks = {site: torch.zeros_like(mask) for site, mask in self.masks.items()}
        for _, site, i in kept:
            self.masks[site][i] = True

    def agrees(self, kept: Mapping[str, Tensor]) -> bool:
        """Whether `kept` is this choice, except for triplets whose scores agree to the rounding of averages in float32."""
        odd = [self.scores[site, i] for site, mask in self.masks.items() for i in (mask != kept[site]).nonzero().flatten().tolist()]
        return not odd or max(odd) < (1 + 1e-4) * min(odd)


RUNS: dict[str, dict[str, Any]] = {
    "every step": {"interval": 1, "target_rank": 2, "warmup_steps": 10, "final_steps": 20},
    "every seventh step, to nothing": {"interval": 7, "target_rank": 0, "warmup_steps": 0, "final_steps": 1},
    "with a least rank": {"interval": 5, "target_rank": 1, "min_rank": 1, "overrides": {"head": {"min_rank": 3}, "conv": {"min_rank": 0}}},
    "other ranks": {"interval": 3, "target_rank": 2, "overrides": {"mlp.*": {"rank": 6}, "embed": {"rank": 2, "min_rank": 1}}},
    "with a long memory": {"interval": 1, "target_rank": 2, "beta1": 0.98, "beta2": 0.3},
    "in bfloat16": {"interval": 2, "target_rank": 2, "dtype": "bfloat16"},
}


def rows(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name == "B" else tensor


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_keeps_the_triplets_that_the_paper_keeps(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    adapter = tg.apply(model, "adalora", ["@all"], rank=4, allocator="budget", total_steps=200, **options)
    optimizer = adapter.optimizer("adamw", lr=0.02)
    config, ranks = adapter.config, {name: part.config.rank for name, part in adapter.parts.items()}
    masks = {name: torch.ones(rank, dtype=torch.bool) for name, rank in ranks.items()}
    least = {name: part.config.min_rank or 0 for name, part in adapter.parts.items()}
    paper = Paper(config.beta1, config.beta2, least, masks)
    warmup = 20 if config.warmup_steps is None else config.warmup_steps
    final = 20 if config.final_steps is None else config.final_steps
    parked: dict[str, Tensor] = {}
    end, changes, back, losses = config.target_rank * len(ranks), 0, 0, []
    for step in range(1, 201):
        loss = (model(TOKENS) - TOKENS[..., None] / 5).square().mean()
        (loss + adapter.penalty()).backward()
        losses.append(loss.item())
        optimizer.step()
        full = {}
        for key, parameter in adapter.named_parameters():
            site, name = key.rsplit(".", 1)
            weight, gradient = (torch.zeros(ranks[site], rows(name, parameter).shape[1]) for _ in range(2))
            weight[paper.masks[site]] = rows(name, parameter.detach()).float()
            if parameter.grad is not None:
                gradient[paper.masks[site]] = rows(name, parameter.grad).float()
            paper.observe(site, name, weight, gradient)
            full[key] = weight
        before = dict(paper.masks)
        if (step >= warmup and step % config.interval == 0 and step < 200 - final) or step == 200 - final:
            paper.allocate(floor(exact_budget(step, sum(ranks.values()), end, 200, warmup, final) + Fraction(1, 10**9)))
        adapter.step(optimizer, step=step)
        optimizer.zero_grad()
        if step < 200 - final:
            kept = {site: adapter.state[f"{site}.kept"].clone() for site in ranks}
            assert paper.agrees(kept), step
            paper.masks = kept
        for site, mask in paper.masks.items():
            part = adapter.parts[site]
            assert part.config.r == int(mask.sum()) == part.A.shape[0] == part.E.shape[0] == part.B.shape[1]
            for name, parameter in part.named_parameters():
                last_seen = parked.setdefault(f"{site}.{name}", full[f"{site}.{name}"])
                last_seen[before[site]] = full[f"{site}.{name}"][before[site]]
                want = last_seen.clone()
                if name == "E":
                    want[~before[site]] = 0
                assert torch.equal(rows(name, parameter).float(), want[mask])
            back += int((mask & ~before[site]).sum())
            changes += not torch.equal(before[site], mask)
    assert changes > 5
    assert back or "beta1" not in options, "one triplet must have come back"
    assert sum(part.config.r for part in adapter.parts.values()) == max(end, sum(least.values()))
    assert min(losses) < 0.9 * losses[0]
    assert set(adapter.state) == {"history", "finished"}, "a finished run keeps no averages"
    allocations = [entry["step"] for entry in adapter.state["history"]]
    assert allocations[-1] == 200 - final
    assert allocations[:2] == [first for first in range(1, 200) if first >= warmup and first % config.interval == 0][:2]


def test_the_number_that_is_trained_falls_with_the_ranks_and_is_the_tensors_size() -> None:
    model = Plain()
    adapter = tg.apply(model, "adalora", ["@all"], **BUDGET, target_rank=1)
    before = adapter.count().trainable
    optimizer = adapter.optimizer("adamw", lr=0.02)
    for step in range(1, 21):
        (model(TOKENS).square().mean() + adapter.penalty()).backward()
        optimizer.step()
        adapter.step(optimizer, step=step)
        optimizer.zero_grad()
    sizes = sum(part.config.r * (part.site.in_features + part.site.out_features + 1) for part in adapter.parts.values())
    assert adapter.count().trainable == sizes == sum(p.numel() for p in model.parameters() if p.requires_grad) < 0.4 * before
    assert sum(part.config.r for part in adapter.parts.values()) == len(adapter.parts)


def test_a_target_that_is_the_initial_rank_changes_nothing() -> None:
    model = Plain()
    adapter = tg.apply(model, "adalora", ["@all"], **BUDGET, target_rank=4)
    perturb_(adapter.parameters())
    optimizer, before = torch.optim.SGD(adapter.parameters(), lr=0.0), model(TOKENS)
    for step in range(1, 21):
        model(TOKENS).square().mean().backward()
        adapter.step(optimizer, step=step)
    assert torch.equal(model(TOKENS), before)
    assert {part.config.r for part in adapter.parts.values()} == {4}


def test_the_output_is_the_base_s_before_training() -> None:
    torch.manual_seed(0)
    model = Plain().requires_grad_(False)
    before = model(TOKENS)
    adapter = tg.apply(model, "adalora", ["@all"], **BUDGET)
    assert torch.equal(model(TOKENS), before)
    assert all(part.A.any() and part.B.any() and not part.E.any() for part in adapter.parts.values())


def test_the_penalty_is_the_distance_of_p_and_q_from_orthogonal_on_a_model_without_a_loss() -> None:
    model = Plain()
    adapter = tg.apply(
        model, "adalora", ["@all"], **BUDGET, orthogonality=0.3, overrides={"head": {"orthogonality": 2.0}, "conv": {"rank": 3}}
    )
    perturb_(adapter.parameters())
    doubles = {name: p.detach().double().requires_grad_() for name, p in adapter.named_parameters()}
    want = torch.zeros(()).double()
    for site in adapter.parts:
        p, q, one = doubles[f"{site}.B"], doubles[f"{site}.A"], torch.eye(3 if site == "conv" else 4).double()
        want = want + (2.0 if site == "head" else 0.3) * ((p.T @ p - one).pow(2).sum() + (q @ q.T - one).pow(2).sum())
    got = adapter.penalty()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    got.backward()
    want.backward()
    for name, parameter in adapter.named_parameters():
        if name.endswith("E"):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad.double(), doubles[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {**BUDGET, "orthogonality": 0.0}], ids=["energy", "γ = 0"])
def test_there_is_no_penalty_without_p_and_q_or_weight(options: dict[str, Any]) -> None:
    assert tg.apply(Plain(), "adalora", ["@all"], **{"rank": 4, **options}).penalty() == 0


def test_without_gradients_a_step_says_where_to_call_it_and_changes_nothing() -> None:
    model = Plain()
    adapter = tg.apply(model, "adalora", ["@all"], **BUDGET)
    optimizer = adapter.optimizer("adamw", lr=0.02)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    adapter.step(optimizer, step=1)
    optimizer.zero_grad()
    before = deepcopy(adapter.state)
    with pytest.raises(tg.AttachError, match=r"has no gradients.*after loss\.backward\(\).*before optimizer\.zero_grad\(\)"):
        adapter.step(optimizer, step=2)
    assert all(torch.equal(adapter.state[key], value) for key, value in before.items() if isinstance(value, Tensor))


def test_a_layer_that_took_no_part_in_a_step_has_a_sensitivity_of_0() -> None:
    model = Plain()
    adapter = tg.apply(model, "adalora", ["@all"], **BUDGET)
    optimizer = adapter.optimizer("adamw", lr=0.02)
    for step in (1, 2):
        model(TOKENS).square().mean().backward()
        optimizer.step()
        if step == 2:  # as an expert that no token was sent to
            before = {key: value.clone() for key, value in adapter.state.items() if key.startswith("head.B.")}
            for parameter in adapter.parts["head"].parameters():
                parameter.grad = None
        adapter.step(optimizer, step=step)
        optimizer.zero_grad()
    mean = 0.85 * before["head.B.sensitivity"]
    torch.testing.assert_close(adapter.state["head.B.sensitivity"], mean)
    torch.testing.assert_close(adapter.state["head.B.uncertainty"], 0.85 * before["head.B.uncertainty"] + 0.15 * mean)


@pytest.mark.parametrize("allocator", ["energy", "budget"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_after_each_change_of_rank(name: str, allocator: str) -> None:
    options = {"energy": {"interval": 4, "epsilon": 0.2, "growth": 1}, "budget": {"allocator": "budget", "total_steps": 50, "interval": 4}}
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6))
    adapter = tg.apply(model, "adalora", ["@all"], rank=5, **options[allocator])
    if allocator == "budget":
        perturb_(adapter.parameters(), 0.2)
    optimizer, x, losses, alive = OPTIMIZERS[name](adapter), torch.randn(32, 7), [], []
    for group in optimizer.param_groups:
        group["lr"] = 0.05 if name == "SGD" else 0.02
    for step in range(1, 61):
        loss = (model(x) - x[:, :6].cos()).square().mean()
        loss.backward()
        optimizer.step()
        adapter.step(optimizer, step=step, metrics={"val_loss": 1.0} if step % 20 == 0 else {})
        optimizer.zero_grad()
        losses.append(loss.item())
        alive.append(loss)  # graphs of earlier shapes do not disturb
        for parameter in adapter.parameters():
            assert all(v.shape == parameter.shape for key, v in optimizer.state[parameter].items() if key in SQUARES | set(MEANS))
    assert len({tuple(entry["ranks"].values()) for entry in adapter.state["history"]}) > 1
    assert losses[-1] < 0.8 * losses[0]


def snapshot(adapter: tg.Adapter) -> tuple[dict[str, Tensor], dict[str, Any], list[Any]]:
    tensors = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    return tensors, deepcopy({k: v for k, v in adapter.state.items() if k.endswith(".kept")}), [p.config for p in adapter.parts.values()]


REFUSED: dict[str, tuple[Callable[[tg.Adapter], torch.optim.Optimizer], str]] = {
    "8-bit moments": (lambda adapter: adapter.optimizer("adamw_8bit", lr=0.01), "AdamW8bit stores its moments in 8-bit blocks"),
    "a stranger": (lambda adapter: torch.optim.Adam(nn.Linear(2, 2).parameters()), "has none of the adapter's parameters"),
    "the A alone": (lambda adapter: torch.optim.Adam([part.A for part in adapter.parts.values()]), "0.*B|parameters"),
    "unknown moments": (lambda adapter: torch.optim.Rprop(adapter.parameters()), "Rprop stores '.*' for each parameter"),
    "moments of other shapes": (lambda adapter: torch.optim.Adafactor(adapter.parameters()), "Adafactor stores '.*' for each"),
}


@pytest.mark.parametrize("allocator", ["energy", "budget"])
@pytest.mark.parametrize("optimizer", REFUSED)
def test_an_optimizer_that_cannot_follow_is_refused_before_anything_changes(optimizer: str, allocator: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1100, 8), nn.Linear(8, 6))
    options = {"energy": {"epsilon": 0.5}, "budget": {"allocator": "budget", "total_steps": 10, "warmup_steps": 0}}
    adapter = tg.apply(model, "adalora", ["@all"], rank=4, interval=1, **options[allocator])
    perturb_(adapter.parameters())
    make, message = REFUSED[optimizer]
    one = make(adapter)
    model(torch.randn(3, 1100)).square().mean().backward()
    one.step()
    before = snapshot(adapter)
    with pytest.raises(tg.AttachError, match=message):
        adapter.step(one, step=5)
    tensors, kept, configs = snapshot(adapter)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before[0].items())
    assert configs == before[2]
    assert all(mask.all() for mask in kept.values()), "no triplet may be parked"
    fits = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter.step(fits, step=5)
    assert [part.config.r for part in adapter.parts.values()] != [4, 4]


def test_8_bit_moments_of_small_tensors_are_kept_in_32_bits_and_can_follow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 6))
    adapter = tg.apply(model, "adalora", ["@all"], **BUDGET)
    optimizer = adapter.optimizer("adamw_8bit", lr=0.01)
    for step in range(1, 21):
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
        adapter.step(optimizer, step=step)
        optimizer.zero_grad()
    assert sum(part.config.r for part in adapter.parts.values()) == 6
    assert {optimizer.state[p]["state1"].dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("options", [{"interval": 1}, {**BUDGET, "warmup_steps": 1}], ids=["energy", "budget"])
def test_a_current_rank_that_is_given_at_the_start_can_be_trained(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 6))
    adapter = tg.apply(model, "adalora", ["@all"], **{"rank": 4, **options}, current=3)
    optimizer = adapter.optimizer("adamw", lr=0.02)
    for step in range(1, 21):
        (model(torch.randn(4, 7)).square().mean() + adapter.penalty()).backward()
        optimizer.step()
        adapter.step(optimizer, step=step)
        optimizer.zero_grad()
        assert all(part.config.r <= 3 for part in adapter.parts.values())


def test_tensors_stay_contiguous() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 6))
    adapter = tg.apply(model, "adalora", ["@all"], **BUDGET)
    model(torch.randn(4, 7)).square().mean().backward()
    adapter.step(torch.optim.SGD(adapter.parameters(), lr=0.0), step=19)
    assert all(parameter.is_contiguous() for parameter in adapter.parameters())


BOTH_BUDGET = {"allocator": "budget", "total_steps": 10}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"allocator": "budget"}, "give total_steps"),
    ({"allocator": "svd"}, "allocator = 'svd'"),
    ({**BOTH_BUDGET, "warmup_steps": 5, "final_steps": 5}, r"warmup_steps \+ final_steps = 10 .*total_steps = 10"),
    ({"allocator": "budget", "total_steps": 1}, r"warmup_steps \+ final_steps"),
    ({**BOTH_BUDGET, "target_rank": 9}, "target_rank = 9 is above the initial rank, 8"),
    ({**BOTH_BUDGET, "init": "orthogonal"}, "init"),
    ({"init": "pissa"}, "init = 'pissa'"),
    ({"total_steps": 5, "beta1": 0.5}, "total_steps, beta1: allocator = 'energy' has no use"),
    ({"orthogonality": 0.5}, "orthogonality: allocator = 'energy' has no use"),
    *(
        ({**BOTH_BUDGET, **extra}, f"{next(iter(extra))}: allocator = 'budget' has no use")
        for extra in ({"epsilon": 0.5}, {"max_rank": 9}, {"growth": 1}, {"tolerance": 0.5})
    ),
    ({"min_rank": 17}, "min_rank = 17 is above the largest rank, 16"),
    ({"rank": 3, "min_rank": 5, "max_rank": 4}, "min_rank = 5 is above the largest rank, 4"),
    ({**BOTH_BUDGET, "min_rank": 9}, "min_rank = 9 is above the largest rank, 8"),
    ({"max_rank": 4}, "max_rank = 4"),
    ({"epsilon": 1.0}, "epsilon = 1.0"),
    ({"interval": 0}, "interval = 0"),
    ({**BOTH_BUDGET, "beta1": 1.0}, "beta1 = 1.0"),
    ({"current": 20}, "current"),
    ({**BOTH_BUDGET, "current": 9}, "current"),
    *(({"overrides": {"@all": {name: 3}}}, f"option {name} applies to the whole adapter") for name in sorted(AdaloraConfig.adapter_wide)),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[", ".join(map(str, options.items())) for options, _ in WRONG])
def test_options_that_do_not_go_together_are_refused_in_one_line_that_names_them(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(tg.ConfigError, match=message) as error:
        tg.apply(model, "adalora", ["@all"], **{"rank": 8, **options})
    assert "\n" not in str(error.value)
    assert tg.adapters(model) == {}
