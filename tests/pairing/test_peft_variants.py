"""Adapters whose place the files alone do not show: the adapter itself or transformers' model class does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import torchgraft as tg
from references import tree

ALPHA, RANK = 6, 3


def write_base(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, tensors: dict[str, Tensor], targets: Any, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


def factors(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, inputs, generator=generator), torch.randn(outputs, RANK, generator=generator)


def merged(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Merge, see that unmerging restores the base's bytes, and return the merged tensors."""
    out, back = base.parent / "out", base.parent / "back"
    tg.merge_checkpoint(base, adapter, out)
    tg.unmerge_checkpoint(out, back)
    assert tree(back) == tree(base)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("shape", "is_transposed", "fan_in_fan_out"),
    [((5, 8), False, False), ((5, 8), True, True), ((5, 8), True, False), ((6, 6), False, False), ((6, 6), True, True)],
)
def test_the_adapters_shapes_show_an_orientation_that_the_name_does_not(
    shape: tuple[int, int], is_transposed: bool, fan_in_fan_out: bool, tmp_path: Path
) -> None:
    weight = torch.randn(shape[::-1] if is_transposed else shape)
    base = write_base(tmp_path / "base", {"block.strange_name.weight": weight})
    a, b = factors(*shape)
    tensors = {"block.strange_name.lora_A.weight": a, "block.strange_name.lora_B.weight": b}
    adapter = write_adapter(tmp_path / "adapter", tensors, ["strange_name"], fan_in_fan_out=fan_in_fan_out)
    change = ALPHA / RANK * (b.double() @ a.double())
    expected = (weight.double() + (change.T if is_transposed else change)).float()
    assert torch.equal(merged(base, adapter)["block.strange_name.weight"], expected)


def test_convolutions_and_embeddings_show_their_kind(tmp_path: Path) -> None:
    conv, embedding = torch.randn(5, 4, 3, 2), torch.randn(9, 4)
    base = write_base(tmp_path / "base", {"filter.weight": conv, "lookup.weight": embedding})
    a, b = torch.randn(RANK, 4, 3, 2), torch.randn(5, RANK, 1, 1)
    first, second = torch.randn(RANK, 9), torch.randn(4, RANK)
    tensors = {"filter.lora_A.weight": a, "filter.lora_B.weight": b, "lookup.lora_embedding_A": first, "lookup.lora_embedding_B": second}
    found = merged(base, write_adapter(tmp_path / "adapter", tensors, ["filter", "lookup"]))
    change = (b.double().reshape(5, RANK) @ a.double().reshape(RANK, -1)).reshape(conv.shape)
    assert torch.equal(found["filter.weight"], (conv.double() + 2 * change).float())
    assert torch.equal(found["lookup.weight"], (embedding.double() + 2 * (second.double() @ first.double()).T).float())


def test_the_model_class_shows_the_orientation_of_a_square_weight(tmp_path: Path) -> None:
    """PEFT records fan_in_fan_out of the module that it replaced last, so the class decides if there is one."""
    config = hf.OPTConfig(vocab_size=32, hidden_size=8, word_embed_proj_dim=4, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    hf.OPTForCausalLM(config).save_pretrained(tmp_path / "base")
    name = "model.decoder.layers.0.fc1"
    a, b = factors(8, 8)
    adapter = write_adapter(tmp_path / "adapter", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, ["fc1"], fan_in_fan_out=True)
    weight = load_file(tmp_path / "base/model.safetensors")[f"{name}.weight"]
    found = merged(tmp_path / "base", adapter)[f"{name}.weight"]
    torch.testing.assert_close(found, (weight.double() + 2 * (b.double() @ a.double())).float(), rtol=0, atol=1e-6)


def small_llama(folder: Path, extra: Callable[[str], str | None]) -> tuple[Path, Path]:
    """Write a llama of one block with further tensors, copied from that block, and an adapter of PEFT's form for the block."""
    config = hf.LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(folder / "base")
    file = folder / "base/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {new: tensor.clone() for name, tensor in tensors.items() if (new := extra(name))}, file, {"format": "pt"})
    a, b = factors(8, 8)
    name = "model.layers.0.self_attn.q_proj"
    return folder / "base", write_adapter(folder / "adapter", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, ["q_proj"])


@pytest.mark.parametrize("prefix", ["model.layers.1.", "mtp.layers.0.", "talker.model.layers.0."])
def test_layers_that_the_model_class_does_not_load_are_copied_and_named(prefix: str, tmp_path: Path) -> None:
    base, adapter = small_llama(tmp_path, lambda name: name.replace("model.layers.0.", prefix) if "layers.0." in name else None)
    before, after = load_file(base / "model.safetensors"), merged(base, adapter)
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}
    notes = tg.merge_checkpoint(base, adapter, tmp_path / "again").notes
    said = f"1 layers stay as they are, because LlamaForCausalLM does not load them: {prefix}self_attn.q_proj"
    assert said in notes


def test_a_layer_of_the_model_that_the_adapter_lacks_is_still_a_problem(tmp_path: Path) -> None:
    base, adapter = small_llama(tmp_path, lambda name: None)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))
    with pytest.raises(tg.PairingError, match=r"v_proj: target_modules match this layer, but the adapter has no tensor for it"):
        tg.merge_checkpoint(base, adapter, tmp_path / "out")


def test_each_expert_of_its_own_is_merged_by_an_adapter_with_its_name(tmp_path: Path) -> None:
    weights = {f"model.layers.0.mlp.experts.{n}.{leaf}.weight": torch.randn(6, 4) for n in range(2) for leaf in ("up_proj", "w1")}
    base = write_base(tmp_path / "base", weights | {"model.layers.0.mlp.gate.weight": torch.randn(2, 4)})
    a, b = factors(6, 4)
    tensors = {name.replace("weight", f"lora_{letter}.weight"): value.clone() for name in weights for letter, value in (("A", a), ("B", b))}
    found = merged(base, write_adapter(tmp_path / "adapter", tensors, ["up_proj", "w1"]))
    for name, weight in weights.items():
        assert torch.equal(found[name], (weight.double() + 2 * (b.double() @ a.double())).float())


WRAPPED: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "a compiled block": lambda name: re.sub(r"(layers\.\d+)", r"\1._orig_mod", name),
    "FSDP": lambda name: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module", name),
    "checkpointed in FSDP": lambda name: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module", name),
    "state dict of the PeftModel": lambda name: name.replace(".weight", ".default.weight"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "all": lambda name: "module._orig_mod." + name.replace(".weight", ".my_name.weight").removeprefix("base_model.model."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_segments_of_wrappers_are_left_out_of_names(wrapper: str, tmp_path: Path) -> None:
    base, adapter = small_llama(tmp_path, lambda name: None)
    expected = merged(base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({WRAPPED[wrapper](name): tensor for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    report = tg.merge_checkpoint(base, adapter, tmp_path / "wrapped")
    found = load_file(tmp_path / "wrapped/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any("which are left out" in note or " are model." in note for note in report.notes)
    tg.unmerge_checkpoint(tmp_path / "wrapped", tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(base)
    model = hf.LlamaForCausalLM.from_pretrained(base)
    loaded = tg.load(model, adapter)
    loaded.save(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved/adapter_model.safetensors")) == set(tensors)


def test_two_adapters_in_one_state_dict_are_not_taken_for_one(tmp_path: Path) -> None:
    base, adapter = small_llama(tmp_path, lambda name: None)
    tensors = load_file(adapter / "adapter_model.safetensors")
    both = {name.replace(".weight", f".{which}.weight"): tensor.clone() for name, tensor in tensors.items() for which in ("one", "two")}
    save_file(both, adapter / "adapter_model.safetensors")
    with pytest.raises(tg.PairingError):
        tg.merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_text_adapter_is_merged_into_the_vision_language_checkpoint_that_its_class_loads(tmp_path: Path) -> None:
    text = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8}
    text |= {"num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4}
    config = hf.Qwen3_5Config(text_config=text | {"linear_value_head_dim": 8}, vision_config=vision | {"num_position_embeddings": 16})
    torch.manual_seed(0)
    hf.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    name, own = "model.layers.3.self_attn.o_proj", "model.language_model.layers.3.self_attn.o_proj"
    weight = load_file(tmp_path / "base/model.safetensors")[f"{own}.weight"]
    a, b = factors(*weight.shape)
    adapter = write_adapter(tmp_path / "adapter", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, ["o_proj"])
    found = merged(tmp_path / "base", adapter)[f"{own}.weight"]
    torch.testing.assert_close(found, (weight.double() + 2 * (b.double() @ a.double())).float(), rtol=0, atol=1e-6)
