"""Layers of which a model reads the weight and does not call the forward are refused, in memory and on files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import torchgraft as tg
from torchgraft.checkpoint.reading import open_checkpoint
from torchgraft.layers.bypassed import bypassed_children, bypassed_modules
from torchgraft.layers.of_checkpoint import layers_of_checkpoint

SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
MIXERS: dict[str, tuple[type[Any], dict[str, Any], set[str]]] = {
    "mamba": (hf.MambaForCausalLM, {"state_size": 4}, {"out_proj", "dt_proj", "conv1d"}),
    "falcon_mamba": (hf.FalconMambaForCausalLM, {"state_size": 4}, {"out_proj", "dt_proj", "conv1d"}),
    "mamba2": (hf.Mamba2ForCausalLM, {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}, {"out_proj", "conv1d"}),
    "nemotron_h": (
        hf.NemotronHForCausalLM,
        {**ATTENTION, "layers_block_type": ["mamba"], "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4},
        {"out_proj", "conv1d"},
    ),
}


def mixer(name: str) -> Any:
    cls, options, _ = MIXERS[name]
    torch.manual_seed(0)
    return cls(hf.AutoConfig.for_model(name, **SMALL, **options))


def refused_here(model: nn.Module) -> set[str]:
    return {layer.name for layer in tg.plan(model, targets=["@all"]).layers if "is bypassed" in layer.reason}


@pytest.mark.parametrize("name", MIXERS)
def test_memory_and_files_refuse_the_same_layers_of_a_mixer(name: str, tmp_path: Path) -> None:
    model = mixer(name)
    model.save_pretrained(tmp_path)
    layers = layers_of_checkpoint(open_checkpoint(tmp_path))
    on_files = {layer.name for layer in layers if "is bypassed" in layer.reason}
    assert {layer.rpartition(".")[2] for layer in on_files} == MIXERS[name][2]
    assert {layer.partition("layers.")[2] for layer in refused_here(model)} == {layer.partition("layers.")[2] for layer in on_files}
    adapter = tg.apply(model, "lora", ["@linear"])
    assert not {site.name.rpartition(".")[2] for site in adapter.sites} & MIXERS[name][2]
    with pytest.raises(tg.SelectionError, match="is bypassed"):
        tg.apply(mixer(name), "lora", ["out_proj" if "out_proj" in MIXERS[name][2] else "dt_proj"])


@pytest.mark.parametrize("name", MIXERS)
def test_what_the_default_targets_of_a_mixer_merge_is_what_the_adapted_model_computes(name: str) -> None:
    model = mixer(name).eval()
    adapter = tg.apply(model, "lora", ["@linear"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        x = torch.arange(12).reshape(2, 6)
        before = model(x, use_cache=False).logits
        adapter.merge()
        torch.testing.assert_close(model(x, use_cache=False).logits, before, rtol=1e-4, atol=1e-5)


def siglip() -> Any:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**small, image_size=8, patch_size=4))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # by PEFT
def test_an_adapter_of_peft_on_the_pooling_head_of_siglip_is_refused_in_memory_and_on_files(tmp_path: Path) -> None:
    """PEFT's forward does not apply it either, and PEFT's merge does: the two differ."""
    siglip().save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(siglip(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = wrapped(x).pooler_output
        assert (wrapped.merge_and_unload()(x).pooler_output - before).abs().max() > 1e-3
    says = "out_proj: is bypassed: a MultiheadAttention reads its weight"
    with pytest.raises(tg.PairingError, match=says):
        tg.load(siglip(), tmp_path / "adapter")
    with pytest.raises(tg.PairingError, match=says):
        tg.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


class Reads(nn.Module):
    """Reads weights in every way that says nothing about values, and in one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(2, 2) for _ in range(4))
        self.start = self.k_proj.weight.sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.q_proj.weight.dtype).to(self.q_proj.weight.device).reshape(-1, self.v_proj.weight.shape[1])
        return self.v_proj(self.k_proj(self.q_proj(x))) @ self.out_proj.weight.T


def test_only_a_read_of_values_outside_the_constructor_counts() -> None:
    assert bypassed_children(Reads) == {"out_proj"}
    assert [name for name, module in Reads().named_modules() if module in bypassed_modules(Reads())] == []
    model = Reads()
    assert list(bypassed_modules(model)) == [model.out_proj]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t5", {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2}),
        ("gptj", {"n_embd": 16, "n_head": 2, "n_layer": 1, "rotary_dim": 4}),
    ],
)
def test_layers_of_other_models_are_not_taken_for_bypassed_ones(name: str, options: dict[str, int]) -> None:
    model = hf.AutoModel.from_config(hf.AutoConfig.for_model(name, vocab_size=32, **options))
    assert bypassed_modules(model) == {}
