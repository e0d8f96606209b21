"""AdaLoRA in files: PEFT's ADALORA both ways, and runs that are saved in the middle and go on."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import models
import torchgraft as tg

# What PEFT says on its own account: of its file with a rank of 0, and of the two types that its rank_pattern has.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("Adapter 'default'.*LoRA tensor", "The following rank_pattern keys", "fan_in_fan_out is set to", "`is_gradient_checkp")
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = torch.arange(3, 17).reshape(2, 7)
ALLOCATORS: dict[str, dict[str, Any]] = {
    "energy": {"interval": 4, "epsilon": 0.3, "growth": 1},
    "budget": {"allocator": "budget", "total_steps": 24, "target_rank": 1, "warmup_steps": 2, "interval": 2},
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "none": {},
    "alphas": {"*.1.*": {"alpha": 3.0}, "second": {"alpha": 3.0}},
    "ranks and alphas": {
        "q_proj": {"rank": 2},
        "c_attn": {"rank": 6},
        "up_proj": {"rank": 5, "alpha": 0.7},
        "first": {"rank": 6, "alpha": 1.1},
    },
}


TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "mlp.c_fc"], "conv2d": ["first", "second", "head"]}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 2), padding=1)
        self.second = nn.Conv2d(8, 6, 3, stride=2, dilation=2, bias=False)  # PEFT's cannot have groups
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).mean((2, 3)))


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build(family) if family != "conv2d" else Convolutions().eval()


def run(model: nn.Module) -> Tensor:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if isinstance(base, Convolutions):
        return model(torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(3)))
    return model(input_ids=TOKENS).logits


def train(adapter: tg.Adapter, optimizer: torch.optim.Optimizer, steps: range, seeded: bool = False) -> None:
    for step in steps:
        noise = torch.randn(1) if seeded else torch.zeros(1)
        ((run(adapter.model) - 0.3 - 0.1 * noise).square().mean() + adapter.penalty()).backward()
        optimizer.step()
        adapter.step(optimizer, step=step, metrics={"val_loss": 1.0} if step in (12, 16) else {})
        optimizer.zero_grad()


def trained(family: str, allocator: str, steps: int = 24, **options: Any) -> tg.Adapter:
    adapter = tg.apply(build(family), "adalora", **{"rank": 4, **ALLOCATORS[allocator], **options})
    train(adapter, adapter.optimizer("adamw", lr=0.02), range(1, steps + 1))
    return adapter


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "conv2d"])
@pytest.mark.filterwarnings("ignore:.*is more than min:torchgraft.TorchgraftWarning")
def test_peft_computes_our_adapter_after_its_ranks_have_changed(
    family: str, allocator: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    targets = TARGETS[family]
    wide = [] if family == "conv2d" else ["*.1.*"]
    own = {pattern: values for pattern, values in overrides.items() if pattern in targets + wide}
    adapter = trained(family, allocator, targets=targets, overrides=own)
    ranks = {name: part.config.r for name, part in adapter.parts.items()}
    assert all(rank != adapter.parts[name].config.rank for name, rank in ranks.items()) or allocator == "budget"
    assert 0 in ranks.values() or allocator == "energy"
    adapter.save(tmp_path)
    base = build(family)
    before = run(base)
    model = peft.PeftModel.from_pretrained(base, tmp_path)
    held, written = peft.get_peft_model_state_dict(model), load_file(tmp_path / "adapter_model.safetensors")
    assert held.keys() == written.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(held[name], tensor.to(held[name].dtype), rtol=0, atol=0)
    torch.testing.assert_close(run(model), run(adapter.model), **CLOSE)
    assert (run(model) - before).abs().max() > 1e-3
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ADALORA"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_computes_our_adapter_where_e_carries_a_ratio_of_scales(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    adapter = tg.apply(build("llama"), "adalora", ["q_proj"], rank=4, overrides={"*.1.*": {"alpha": 3.0}})
    models.perturb_(adapter.parameters())
    adapter.save(tmp_path)
    model = peft.PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(run(model), run(adapter.model), **CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # the ratio is carried in float64, which float64 itself does not survive
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_what_we_save_we_load_bit_for_bit_also_where_e_carries_a_ratio_of_scales(allocator: str, dtype: str, tmp_path: Path) -> None:
    overrides = {"*.0.*": {"alpha": 1.1}, "up_proj": {"rank": 6, "alpha": 3.3}, "down_proj": {"scaling": "none"}}
    adapter = tg.apply(build("llama"), "adalora", rank=4, dtype=dtype, overrides=overrides, **ALLOCATORS[allocator])
    models.perturb_(adapter.parameters())
    for parameter in adapter.parameters():
        parameter.data *= torch.pi  # to fill all the bits
    adapter.save(tmp_path / "first")
    again = tg.load(build("llama"), tmp_path / "first")
    assert again.config == adapter.config
    for name, part in adapter.parts.items():
        assert again.parts[name].config == part.config
        for key, tensor in part.tensors().items():
            torch.testing.assert_close(again.parts[name].tensors()[key], tensor, rtol=0, atol=0)
    again.save(tmp_path / "second")
    for file in ("adapter_model.safetensors", "adapter_config.json", "torchgraft.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def test_parameters_have_the_same_order_after_loading(tmp_path: Path) -> None:
    """Optimizers save their moments by order."""
    adapter = tg.apply(build("llama"), "adalora", ["q_proj"], **ALLOCATORS["budget"])
    adapter.save(tmp_path)
    again = tg.load(build("llama"), tmp_path)
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in adapter.named_parameters()]


def peft_trains(directory: Path, steps: int, family: str = "llama", **options: Any) -> nn.Module:
    schedule = {"init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": 16, "lora_alpha": 7}
    model = peft.get_peft_model(build(family), peft.AdaLoraConfig(target_modules=TARGETS[family], **{**schedule, **options}))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    models.perturb_(parameters, 0.1)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for step in range(1, steps + 1):
        (run(model) - 0.3).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return model.eval()


PEFTS: dict[str, dict[str, Any]] = {
    "to the end": {"steps": 16},
    "within the schedule": {"steps": 9},
    "without a rank_pattern": {"steps": 2},
    "untrained": {"steps": 0},
    "convolutions": {"steps": 16, "family": "conv2d"},
    "to rank 0": {"steps": 16, "target_r": 0},
    "one step in all": {"steps": 0, "total_step": 1, "tinit": 0, "tfinal": 0},
    "no warm-up, no end": {"steps": 3, "total_step": 4, "tinit": 0, "tfinal": 0},
    "a target above the rank": {"steps": 1, "target_r": 9},
}


@pytest.mark.parametrize("options", PEFTS.values(), ids=PEFTS)
def test_we_compute_peft_s_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    theirs, model = peft_trains(tmp_path, **options), build(options.get("family", "llama"))
    adapter = tg.load(model, tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] or {}
    assert bool(pattern) == (options["steps"] > 2)
    for name, part in adapter.parts.items():
        assert part.config.r == sum(pattern.get(f"{name}.lora_E", [True] * 5))
    torch.testing.assert_close(run(model), run(theirs), **CLOSE)
    adapter.save(tmp_path / "ours")
    torch.testing.assert_close(
        run(peft.PeftModel.from_pretrained(build(options.get("family", "llama")), tmp_path / "ours")), run(theirs), **CLOSE
    )


@pytest.mark.parametrize("steps", [2, 9, 16])
def test_peft_s_adapter_can_be_trained_on(steps: int, tmp_path: Path) -> None:
    peft_trains(tmp_path, steps)
    adapter = tg.load(build("llama"), tmp_path)
    before = sum(part.config.r for part in adapter.parts.values())
    train(adapter, adapter.optimizer("adamw", lr=0.02), range(steps + 1, 21))
    assert sum(part.config.r for part in adapter.parts.values()) == min(before, 2 * len(adapter.parts))


# Saved in the middle.


@pytest.mark.parametrize("cut", [3, 8, 13, 22, 23])
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_run_that_is_saved_and_goes_on_has_the_same_numbers(allocator: str, cut: int, tmp_path: Path) -> None:
    def start() -> nn.Module:
        return build("conv2d").train()

    options = {"rank": 4, "dropout": 0.2, "overrides": {"head": {"alpha": 1.1}, "second": {"rank": 3}}, **ALLOCATORS[allocator]}
    whole = tg.apply(start(), "adalora", ["@all"], **options)
    optimizer = whole.optimizer("adamw", lr=0.02)
    torch.manual_seed(5)
    train(whole, optimizer, range(1, cut + 1), seeded=True)
    whole.save(tmp_path)
    moments, random = deepcopy(optimizer.state_dict()), torch.get_rng_state()
    train(whole, optimizer, range(cut + 1, 28), seeded=True)

    again = tg.load(start(), tmp_path)
    other = again.optimizer("adamw", lr=0.02)
    other.load_state_dict(moments)
    torch.set_rng_state(random)
    train(again, other, range(cut + 1, 28), seeded=True)
    for (name, parameter), (_, same) in zip(sorted(whole.named_parameters()), sorted(again.named_parameters()), strict=True):
        assert torch.equal(parameter, same), name
        assert parameter.shape[0 if name[-1] != "B" else 1] == whole.parts[name[:-2]].config.r
    assert again.state["history"] == whole.state["history"]
    assert len({tuple(entry["ranks"].values()) for entry in whole.state["history"]}) > 1
    assert again.state.keys() == whole.state.keys()


def broken_state(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, broken_state], ids=["missing", "changed"])
def test_a_state_that_is_missing_or_changed_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    adapter = trained("conv2d", "budget", 6, targets=["@all"])
    adapter.save(tmp_path)
    damage(tmp_path / "torchgraft_state.safetensors")
    model = build("conv2d")
    with pytest.raises(tg.FileFormatError, match=r"torchgraft_state\.safetensors: this file is missing or is not the one"):
        tg.load(model, tmp_path)
    assert tg.adapters(model) == {}


def test_a_finished_run_keeps_its_history_and_no_state_file(tmp_path: Path) -> None:
    half, adapter = trained("conv2d", "budget", 10, targets=["@all"]), trained("conv2d", "budget", 24, targets=["@all"])
    half.save(tmp_path)
    assert (tmp_path / "torchgraft_state.safetensors").exists()
    adapter.save(tmp_path)
    assert not (tmp_path / "torchgraft_state.safetensors").exists()
    again = tg.load(build("conv2d"), tmp_path)
    assert again.state == adapter.state
    assert [entry["step"] for entry in again.state["history"]] == [*range(2, 23, 2)]
    before = {name: len(part.A) for name, part in again.parts.items()}
    train(again, again.optimizer("adamw", lr=0.02), range(25, 28))
    assert {name: len(part.A) for name, part in again.parts.items()} == before


# adapter.step that nobody calls; copies.


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("use", ["save", "merge"])
def test_a_run_without_adapter_step_is_warned_of(use: str, loaded: bool, allocator: str, tmp_path: Path) -> None:
    adapter = tg.apply(build("conv2d"), "adalora", ["@all"], rank=4, **ALLOCATORS[allocator])
    adapter.save(tmp_path)  # nothing was trained: no warning
    if loaded:
        adapter = tg.load(build("conv2d"), tmp_path)
    for _ in range(3):
        run(adapter.model).square().mean().backward()
    with pytest.warns(
        tg.TorchgraftWarning, match=r"3 backward passes and adapter\.step\(optimizer, step=…\) was never called.*call it after"
    ):
        adapter.save(tmp_path) if use == "save" else adapter.merge()


def test_no_warning_where_it_was_called_or_nothing_was_trained(tmp_path: Path) -> None:
    adapter = tg.apply(build("conv2d"), "adalora", ["@all"], rank=4)
    run(adapter.model)
    adapter.merge()
    adapter.unmerge()
    train(adapter, adapter.optimizer("adamw", lr=0.02), range(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.save(tmp_path)
        adapter.merge()


def test_a_step_while_merged_is_refused() -> None:
    adapter = trained("conv2d", "energy", 5, targets=["@all"])
    adapter.merge()
    before = [parameter.clone() for parameter in adapter.parameters()]
    with pytest.raises(tg.MergeError, match=r"is merged.*unmerge it first"):
        adapter.step(adapter.optimizer("adamw", lr=0.02), step=8)
    assert all(torch.equal(old, new) for old, new in zip(before, adapter.parameters(), strict=True))
    adapter.unmerge()


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_copy_of_the_model_goes_on_by_itself(allocator: str, copy: Callable[[nn.Module], nn.Module]) -> None:
    first = trained("conv2d", allocator, 9, targets=["@all"])
    second = tg.adapters(copy(first.model))["default"]
    assert second.state.keys() == first.state.keys()
    frozen = [parameter.clone() for parameter in first.parameters()]
    kept = deepcopy(first.state)
    train(second, second.optimizer("sgd", lr=0.01), range(10, 25))
    assert all(torch.equal(old, new) for old, new in zip(frozen, first.parameters(), strict=True))
    assert first.state["history"] == kept["history"] != second.state["history"]
    train(first, first.optimizer("sgd", lr=0.01), range(10, 25))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_copy_that_is_trained_without_adapter_step_is_warned_of_too(tmp_path: Path) -> None:
    copy = tg.adapters(deepcopy(tg.apply(build("conv2d"), "adalora", ["@all"], rank=4).model))["default"]
    run(copy.model).square().mean().backward()
    with pytest.warns(tg.TorchgraftWarning, match="never called"):
        copy.save(tmp_path)
