"""adapt export: an adapter as PEFT's own, and as the plain LoRA that is the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import nn

import torchgraft as tg
from command import Result
from models import GROUPED, SPECIAL, perturb_
from torchgraft.on_files.export import nearest_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks transformers for it
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # PEFT says so of its own AdaLoRA files, too
]
Adapt = Callable[..., Result]
IDS = torch.randint(67, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **SPECIAL)).save_pretrained(directory)
    return directory


def load_base(base: Path) -> nn.Module:
    return hf.LlamaForCausalLM.from_pretrained(base).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def adapter_of(base: Path, directory: Path, method: str, **options: Any) -> torch.Tensor:
    """Save a perturbed adapter; its model's logits."""
    model = load_base(base)
    adapter = tg.apply(model, method, **{"targets": ["@attention", "down_proj"], "rank": 3, "alpha": 5, **options})
    perturb_(adapter.parameters())
    adapter.save(directory)
    return logits(model)


def in_peft(base: Path, directory: Path) -> torch.Tensor:
    """The logits with the exported adapter in PEFT, where nothing may be missing or left over."""
    return logits(PeftModel.from_pretrained(load_base(base), directory).eval())


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


BUDGET = {"allocator": "budget", "total_steps": 10, "rank": 4}
EXACT = {
    "lora": ("lora", {}),
    "lora, rank-stabilised": ("lora", {"scaling": "alpha/sqrt(r)"}),
    "lora, pissa": ("lora", {"init": "pissa"}),
    "lora, ranks and alphas of their own": ("lora", {"overrides": {"q_proj": {"rank": 2}, "*.1.*v_proj": {"alpha": 9.0}}}),
    "loraplus": ("loraplus", {}),
    "adalora, energy": ("adalora", {}),
    "adalora, budget": ("adalora", BUDGET),
    "adalora, ranks of their own": ("adalora", {**BUDGET, "overrides": {"q_proj": {"rank": 6}, "v_proj": {"alpha": 9.0}}}),
    "with a fully trained module": ("lora", {"also_train": ["lm_head"]}),
}


@pytest.mark.parametrize("to", ["lora", "peft"])
@pytest.mark.parametrize("case", EXACT)
def test_the_exported_adapter_is_the_same_function_in_peft(case: str, to: str, base: Path, tmp_path: Path, adapt: Adapt) -> None:
    method, options = EXACT[case]
    want = adapter_of(base, tmp_path / "adapter", method, **options)
    result = adapt("export", tmp_path / "adapter", "--to", to, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert (document["output"], document["sites"], document["left_out"], document["errors"]) == (str(tmp_path / "out"), 10, [], {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == ("ADALORA" if method == "adalora" and to == "peft" else "LORA")
    if to == "lora":
        assert not config["alpha_pattern"], "tools that read no alpha_pattern must scale right, too"
        assert not config["use_rslora"]
    assert_same(in_peft(base, tmp_path / "out"), want)
    model = load_base(base)
    tg.load(model, tmp_path / "out")
    assert_same(logits(model), want)


def test_layers_of_rank_0_are_left_out_and_named(base: Path, tmp_path: Path, adapt: Adapt) -> None:
    options = {**BUDGET, "overrides": {"*.0.*q_proj": {"current": 0}}}
    want = adapter_of(base, tmp_path / "adapter", "adalora", **options)
    result = adapt("export", tmp_path / "adapter", "--to", "lora", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert "skipped (rank 0): model.layers.0.self_attn.q_proj" in result.out
    assert_same(in_peft(base, tmp_path / "out"), want)


def test_dora_is_exported_to_peft_and_refused_as_lora(base: Path, tmp_path: Path, adapt: Adapt) -> None:
    want = adapter_of(base, tmp_path / "adapter", "dora")
    assert adapt("export", tmp_path / "adapter", "--to", "peft", "-o", tmp_path / "peft").code == 0
    assert_same(in_peft(base, tmp_path / "peft"), want)
    for more in ([], ["--base", base]):
        result = adapt("export", tmp_path / "adapter", "--to", "lora", "-o", tmp_path / "lora", *more)
        assert (result.code, result.out) == (2, "")
        assert "no LoRA equals the change that dora makes to it" in result.err
        assert "--rank R --base MODEL" in result.err
        assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("rank", [2, 32])
def test_the_nearest_lora_of_dora_has_the_error_that_is_reported(rank: int, base: Path, tmp_path: Path, adapt: Adapt) -> None:
    adapter_of(base, tmp_path / "adapter", "dora")
    result = adapt("export", tmp_path / "adapter", "--to", "lora", "-o", tmp_path / "out", "--rank", rank, "--base", base, "--json")
    assert result.code == 0, result.err
    errors = json.loads(result.out)["errors"]
    model, merged, near = load_base(base), load_base(base), load_base(base)
    tg.load(merged, tmp_path / "adapter").merge()
    tg.load(near, tmp_path / "out").merge()
    for name, error in errors.items():
        before, after, got = (m.get_submodule(name).weight.detach().double() for m in (model, merged, near))
        sigma = torch.linalg.svdvals(after - before)
        least = (sigma[rank:].square().sum() / sigma.square().sum()).sqrt()
        assert error == pytest.approx(least.item(), abs=2e-5)
        assert ((after - got).norm() / (after - before).norm()).item() == pytest.approx(least.item(), abs=2e-5)
    assert max(errors.values()) < 1e-5 if rank == 32 else min(errors.values()) > 0.1


@pytest.mark.parametrize(("rows", "columns"), [(6, 9), (9, 6), (7, 7)])
def test_the_nearest_lora_of_no_change_is_none(rows: int, columns: int) -> None:
    factors, error = nearest_lora(torch.zeros(rows, columns), 3)
    assert error == 0
    assert not (factors["B"] @ factors["A"]).any()


def test_what_peft_wrote_needs_its_base(base: Path, tmp_path: Path, adapt: Adapt) -> None:
    want = adapter_of(base, tmp_path / "adapter", "adalora", **BUDGET)
    (tmp_path / "adapter" / "torchgraft.json").unlink()
    refused = adapt("export", tmp_path / "adapter", "--to", "lora", "-o", tmp_path / "out")
    assert refused.code == 2
    assert "give its base: --base MODEL" in refused.err
    assert adapt("export", tmp_path / "adapter", "--to", "lora", "-o", tmp_path / "out", "--base", base).code == 0
    assert_same(in_peft(base, tmp_path / "out"), want)


MISTAKES: dict[str, tuple[list[object], str]] = {
    "a rank for what is a LoRA": (["--to", "lora", "--rank", "2", "--base", "BASE"], "leave out the rank"),
    "a rank without a base": (["--to", "lora", "--rank", "2"], "needs its base"),
    "a rank for PEFT's own type": (["--to", "peft", "--rank", "2", "--base", "BASE"], "a rank is for the nearest LoRA"),
    "another format": (["--to", "kohya"], "kohya"),
    "no format": ([], "--to"),
    "a rank of 0": (["--to", "lora", "--rank", "0"], "0"),
    "no such base": (["--to", "lora", "--base", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mistake: str, base: Path, tmp_path: Path, adapt: Adapt) -> None:
    adapter_of(base, tmp_path / "adapter", "lora")
    options, says = MISTAKES[mistake]
    options = [base if option == "BASE" else option for option in options]
    result = adapt("export", tmp_path / "adapter", "-o", tmp_path / "out", *options)
    assert (result.code, result.out) == (2, "")
    assert says in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused(base: Path, tmp_path: Path, adapt: Adapt) -> None:
    adapter_of(base, tmp_path / "adapter", "lora")
    assert adapt("export", tmp_path / "adapter", "--to", "peft", "-o", tmp_path / "adapter").code == 2


def test_a_wrong_base_is_refused(base: Path, tmp_path: Path, adapt: Adapt) -> None:
    adapter_of(base, tmp_path / "adapter", "dora")
    other = deepcopy(load_base(base))
    perturb_(list(other.parameters()))
    other.save_pretrained(tmp_path / "other")
    result = adapt("export", tmp_path / "adapter", "--to", "lora", "-o", tmp_path / "out", "--rank", 2, "--base", tmp_path / "other")
    assert (result.code, "not the one that the adapter was made for" in result.err) == (2, True)
