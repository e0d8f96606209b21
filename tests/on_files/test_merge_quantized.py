"""Merging an adapter that was trained on 4-bit weights: onto what it was trained against, or onto the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchgraft as tg
from models import perturb_
from torchgraft.errors import MergeError, TorchgraftWarning
from torchgraft.kinds.quantized import Linear4bit
from torchgraft.kinds.quantizing import quantized_linear

OPTIONS = [
    {"quant_type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"},
    {"quant_type": "fp4", "double_quant": False, "block_size": 128, "compute_dtype": "float32"},
]
QUANTIZED = ("q_proj", "up_proj")
"""By the adapter's own method; down_proj beforehand, and o_proj not at all."""


def plain(dtype: torch.dtype) -> nn.ModuleDict:
    torch.manual_seed(3)
    shapes = {"q_proj": (64, 64), "up_proj": (192, 64), "down_proj": (64, 192), "o_proj": (64, 64)}
    return nn.ModuleDict({name: nn.Linear(k, d, bias=name == "q_proj") for name, (d, k) in shapes.items()}).to(dtype)


def trained(folder: Path, dtype: torch.dtype, method: str = "qlora", **options: Any) -> dict[str, Tensor]:
    """An adapter on a model whose layers are quantized. Returns what each 4-bit layer computes with."""
    model = plain(dtype)
    model["down_proj"] = quantized_linear(model["down_proj"], tg.Quantization(compute_dtype=options["compute_dtype"]))
    adapter = tg.apply(model, "qlora", list(QUANTIZED), **options)
    if method != "qlora":
        adapter.detach()
        adapter = tg.apply(model, method, list(QUANTIZED))
    adapter_o = tg.apply(model, "lora", ["o_proj"], name="other")
    adapter_o.detach()
    perturb_(adapter.parameters())
    adapter.save(folder)
    return {name: Linear4bit().dequantized(model[name]) for name in (*QUANTIZED, "down_proj")}


def write(folder: Path, dtype: torch.dtype) -> Path:
    folder.mkdir()
    save_file(plain(dtype).state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


def change(folder: Path, layer: str) -> Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.lora_{letter}.weight"].double() for letter in "AB")
    return 2 * (b @ a)


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    distance = (found.double() - exact).abs()
    assert (distance <= torch.finfo(found.dtype).eps / 2 * exact.abs() * (1 + 1e-6) + 1e-300).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=["nf4", "fp4"])
@pytest.mark.parametrize("onto", [None, "quantized"])
def test_exactly_the_layers_that_were_quantized_take_the_round_trip(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any], onto: Any
) -> None:
    base, weights = write(tmp_path / "base", dtype), trained(tmp_path / "a", dtype, **options)
    report = tg.merge_checkpoint(base, tmp_path / "a", tmp_path / "out", onto=onto)
    assert (report.merged_tensors, report.verified) == (3, True)
    assert "merged onto the weights as quantized, on which the adapter was trained (3 layers)" in report.notes[0]
    before, found = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights.items():
        assert not weight.to(dtype).equal(before[f"{name}.weight"])
        extra = change(tmp_path / "a", name) if name in QUANTIZED else 0
        assert_rounded_once(found[f"{name}.weight"], weight.double() + extra)
    for name in ("o_proj.weight", "o_proj.bias", "q_proj.bias"):
        assert name not in before or found[name].equal(before[name])
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_the_original_is_merged_onto_if_asked_with_a_warning(tmp_path: Path) -> None:
    base = write(tmp_path / "base", torch.bfloat16)
    trained(tmp_path / "a", torch.bfloat16, **OPTIONS[0])
    with pytest.warns(TorchgraftWarning, match="was trained on quantized weights"):
        report = tg.merge_checkpoint(base, tmp_path / "a", tmp_path / "out", onto="original")
    assert (report.merged_tensors, report.notes) == (2, ())
    before, found = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in QUANTIZED:
        assert_rounded_once(found[f"{name}.weight"], before[f"{name}.weight"].double() + change(tmp_path / "a", name))
    assert found["down_proj.weight"].equal(before["down_proj.weight"])


def test_another_method_on_quantized_layers_is_merged_as_it_computes(tmp_path: Path) -> None:
    base = write(tmp_path / "base", torch.float32)
    weights = trained(tmp_path / "a", torch.float32, "dora", **OPTIONS[1])
    tg.merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    found, tensors = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name in QUANTIZED:
        v = weights[name].double() + change(tmp_path / "a", name)
        m = tensors[f"base_model.model.{name}.lora_magnitude_vector"].double()
        torch.testing.assert_close(found[f"{name}.weight"].double(), m[:, None] * v / v.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-9)
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_what_was_not_quantized_is_not_merged_onto_quantized_weights(tmp_path: Path) -> None:
    base, model = write(tmp_path / "base", torch.bfloat16), plain(torch.bfloat16)
    tg.apply(model, "lora", ["q_proj"]).save(tmp_path / "a")
    with pytest.raises(MergeError, match="no adapter records how its base was quantized"):
        tg.merge_checkpoint(base, tmp_path / "a", tmp_path / "out", onto="quantized")


@pytest.mark.parametrize(("place", "value"), [("type", "int8"), ("block_size", 63), ("from", "int7"), ("double", None)])
def test_a_quantization_that_is_not_known_is_refused(tmp_path: Path, place: str, value: object) -> None:
    base = write(tmp_path / "base", torch.bfloat16)
    trained(tmp_path / "a", torch.bfloat16, **OPTIONS[0])
    record = json.loads((tmp_path / "a" / "torchgraft.json").read_text())
    record["quantized"]["down_proj"][place] = value
    (tmp_path / "a" / "torchgraft.json").write_text(json.dumps(record))
    with pytest.raises(tg.TorchgraftError):
        tg.merge_checkpoint(base, tmp_path / "a", tmp_path / "out", onto="quantized")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_another_adapter_trained_whole_is_replaced(tmp_path: Path) -> None:
    base, model = write(tmp_path / "base", torch.bfloat16), plain(torch.bfloat16)
    trained(tmp_path / "a", torch.bfloat16, **OPTIONS[0])
    other = tg.apply(model, "lora", ["o_proj"], also_train=["down_proj"])
    perturb_(other.parameters())
    other.save(tmp_path / "b")
    tg.merge_checkpoint(base, {tmp_path / "a": 1.0, tmp_path / "b": 1.0}, tmp_path / "out")
    found, saved = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert found["down_proj.weight"].equal(saved["base_model.model.down_proj.weight"])
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
