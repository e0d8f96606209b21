"""The optional hooks of a method, used by a third-party plugin: scaling rows, which needs more than the bundled methods do together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import torchgraft as tg
from models import perturb_
from torchgraft.method.resize import Resize

NAME = "stranger"


class Options(tg.LowRankConfig):
    """`level` is one number for the whole adapter."""

    adapter_wide = frozenset({"level"})
    rank: int = 2
    level: int = 1
    wanted: int | None = None


class Wide(nn.Linear):
    """What the layer is to become: the same, with a weight of twice the size."""


class Stranger:
    """W' = g·W with one g for each row; g has `rank` copies that are summed, so that there is something to resize."""

    def __init__(self) -> None:
        self.becomes: Callable[[nn.Module], nn.Module | None] = lambda module: None

    @tg.hookimpl
    def adapter_method(self) -> tg.Method:
        return tg.Method(NAME, Options, "", "")

    @tg.hookimpl
    def adapter_prepare(self, site: tg.Site) -> nn.Module | None:
        return self.becomes(site.module) if site.module is not None else None

    @tg.hookimpl
    def adapter_shapes(self, site: tg.Site, config: Options) -> dict[str, tuple[int, ...]]:
        return {"B": (config.wanted or config.rank, site.out_features)}

    @tg.hookimpl
    def adapter_init(self, site: tg.Site, config: Options) -> dict[str, Tensor]:
        return {"B": torch.full((config.wanted or config.rank, site.out_features), 1 / (config.wanted or config.rank))}

    @tg.hookimpl
    def adapter_forward(self, site: tg.Site, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        bias = site.bias if site.bias is not None else torch.zeros(site.out_features)
        return (base(x) - bias) * params["B"].sum(0) + bias

    @tg.hookimpl
    def adapter_merge(self, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
        return weight * params["B"].sum(0)[rows, None]

    @tg.hookimpl
    def adapter_undo(self, weight: Tensor) -> dict[str, Tensor]:
        return {"largest": weight.abs().amax(1)}  # the scale that is left of a row: a g of 0 leaves nothing to divide

    @tg.hookimpl
    def adapter_unmerge(self, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
        largest = weight.abs().amax(1, keepdim=True)
        return weight * params["largest"][rows, None] / largest.where(largest != 0, 1)

    @tg.hookimpl
    def adapter_step(self, adapter: tg.Adapter, optimizer: torch.optim.Optimizer, step: int, metrics: Mapping[str, float]) -> None:
        adapter.state["calls"] = [*adapter.state.get("calls", []), [step, metrics.get("val_loss")]]
        adapter.state["seen"] = torch.tensor([float(step)])
        changes = {}
        for name, part in adapter.parts.items():
            rows = part.tensors()["B"].detach()
            config = part.config.with_(NAME, {"wanted": len(rows) + 1})
            longer = {"B": lambda moment, power: torch.cat([moment, moment[:1]])}
            changes[name] = Resize({"B": torch.cat([rows, 0 * rows[:1]])}, config, longer)
        adapter.resize(changes, optimizer)


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    plugin = Stranger()
    tg.registry().register(plugin, NAME)
    yield plugin
    tg.registry().unregister(NAME)


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_unmerge_needs_is_kept_with_the_merge(stranger: Stranger, dtype: torch.dtype) -> None:
    model = small(dtype)
    before = deepcopy(model.state_dict())
    adapter = tg.apply(model, NAME, ["@all"])
    perturb_(adapter.parameters())
    for _ in range(3):
        adapter.merge()
        assert set(adapter.parts["0"].undo.needed) == {"largest"}
        adapter.unmerge()
    adapter.detach()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_what_unmerge_needs_is_in_the_merged_files(stranger: Stranger, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = small(torch.bfloat16)
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    adapter = tg.apply(model, NAME, ["@all"])
    perturb_(adapter.parameters())
    adapter.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_config.json").exists(), "PEFT has no such method"
    tg.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", kinds={"*": "Linear"})
    tg.unmerge_checkpoint(tmp_path / "merged", tmp_path / "restored")
    files = [hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest() for name in ("base", "merged", "restored")]
    assert files[0] == files[2] != files[1]
    with pytest.raises(tg.MergeError, match="PEFT has no stranger"):
        tg.export_adapter(tmp_path / "adapter", tmp_path / "out", "peft")
    with pytest.raises(tg.MergeError, match="no LoRA equals the change that stranger makes"):
        tg.export_adapter(tmp_path / "adapter", tmp_path / "out", "lora")


def test_the_layer_becomes_what_the_method_prepares_and_stays_the_same_object(stranger: Stranger) -> None:
    model = small()
    first, seen, x = model[0], [], torch.randn(3, 6)
    first.register_forward_hook(lambda *_: seen.append(1))

    def become(module: nn.Module) -> nn.Module:
        wide = Wide(module.in_features, module.out_features, module.bias is not None)
        wide.weight = nn.Parameter(2 * module.weight.detach())
        wide.bias = module.bias
        return wide

    before = 2 * x @ first.weight.T + first.bias
    stranger.becomes = become
    adapter = tg.apply(model, NAME, ["0"])
    assert model[0] is first
    assert isinstance(first, Wide)
    torch.testing.assert_close(first(x), before)
    assert seen, "the hook that was on the layer still runs"
    adapter.merge()
    adapter.detach()
    assert type(first) is Wide
    torch.testing.assert_close(first(x), before)


@pytest.mark.parametrize("problem", ["a failing init", "an adapter on the layer", "a tied weight", "no kind"])
def test_nothing_becomes_anything_if_the_adapter_cannot_be_attached(
    stranger: Stranger, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    stranger.becomes = lambda module: Wide(module.in_features, module.out_features, module.bias is not None)
    if problem == "a failing init":
        monkeypatch.setattr(Options, "advise", lambda config, site: (_ for _ in ()).throw(tg.ConfigError("no")) if site.name == "2" else "")
    elif problem == "an adapter on the layer":
        tg.apply(model, "lora", ["2"], name="other", rank=2)
    elif problem == "a tied weight":
        model.append(nn.Linear(10, 4, bias=False))
        model[3].weight = model[2].weight
    else:
        stranger.becomes = lambda module: nn.Bilinear(2, 2, 2) if module is model[2] else None
    types = [type(module) for module in model]
    with pytest.raises(tg.TorchgraftError):
        tg.apply(model, NAME, ["0", "2"])
    assert [type(module) for module in model] == types


def trained(model: nn.Module, adapter: tg.Adapter, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(adapter.param_groups(lr=1e-2))
    for step in range(1, steps + 1):
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        adapter.step(optimizer, step=step, metrics={"val_loss": 0.5} if step == 2 else {})
        optimizer.zero_grad()
    return optimizer


def test_parameters_change_shape_and_stay_the_same_objects(stranger: Stranger) -> None:
    model = small()
    adapter = tg.apply(model, NAME, ["@all"], rank=2)
    parameters = adapter.parameters()
    optimizer = trained(model, adapter)
    assert [id(p) for p in adapter.parameters()] == [id(p) for p in parameters] == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert [tuple(p.shape) for p in parameters] == [(5, 10), (5, 4)]
    assert all(optimizer.state[p]["exp_avg"].shape == optimizer.state[p]["exp_avg_sq"].shape == p.shape for p in parameters)


def test_state_is_saved_and_comes_back(stranger: Stranger, tmp_path: Path) -> None:
    model = small()
    adapter = tg.apply(model, NAME, ["@all"], rank=2)
    trained(model, adapter)
    want = model(torch.ones(2, 6))
    adapter.save(tmp_path)
    adapter.detach()
    again = tg.load(model, tmp_path)
    assert again.state["calls"] == [[1, None], [2, 0.5], [3, None]]
    assert again.state["seen"].equal(torch.tensor([3.0]))
    assert model(torch.ones(2, 6)).equal(want)
    (tmp_path / "torchgraft_state.safetensors").write_bytes(b"")
    with pytest.raises(tg.FileFormatError, match=r"torchgraft_state\.safetensors: this file is missing or is not the one"):
        tg.load(small(), tmp_path, name="third")


def test_a_run_without_step_is_reported(stranger: Stranger, tmp_path: Path) -> None:
    model = small()
    adapter = tg.apply(model, NAME, ["@all"])
    adapter.save(tmp_path / "untrained")
    for _ in range(4):
        model(torch.ones(2, 6)).sum().backward()
    with pytest.warns(tg.TorchgraftWarning, match=r"trained for 4 backward passes and adapter\.step.* was never called, so stranger did"):
        adapter.save(tmp_path / "trained")


def test_an_option_of_the_whole_adapter_cannot_be_overridden(stranger: Stranger) -> None:
    with pytest.raises(tg.ConfigError, match="option level applies to the whole adapter and cannot be overridden per layer"):
        tg.apply(small(), NAME, ["@all"], overrides={"0": {"level": 2}})


def test_a_method_without_the_hooks_steps_and_prepares_nothing(tmp_path: Path) -> None:
    model = small()
    adapter = tg.apply(model, "lora", ["@all"], rank=2)
    optimizer: Any = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    adapter.step(optimizer, step=1)
    assert adapter.state == {}
    adapter.save(tmp_path)
    assert "state" not in (tmp_path / "torchgraft.json").read_text()
