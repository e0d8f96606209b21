"""Small models of real architectures, built from their configs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import nn

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 67}
GROUPED = {**TEXT, "num_key_value_heads": 2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DISENTANGLED = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 67,
    "max_source_positions": 20,
    "max_target_positions": 16,
    "num_mel_bins": 8,
    "decoder_start_token_id": 1,
    **SPECIAL,
}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **SPECIAL)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED, **SPECIAL)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, **SPECIAL)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=67, n_positions=24, **SPECIAL)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT, **SPECIAL)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, pad_token_id=0, num_labels=3)),
    "bert_lm": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT, pad_token_id=0)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT, **SPECIAL)),
    "deberta": lambda: hf.DebertaForSequenceClassification(hf.DebertaConfig(**DISENTANGLED)),
    "deberta_v2": lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**DISENTANGLED, conv_kernel_size=3)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, vocab_size=67, feed_forward_proj="gated-gelu")
    ),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4, num_labels=3
        )
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
}


def build(family: str, seed: int = 0) -> nn.Module:
    """Return a model of `family` with fixed random weights, in eval."""
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


class Plain(nn.Module):
    """A model of torch's own layers, with every kind that can be adapted but Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "out_proj": nn.Linear(8, 8, bias=False)})
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(self.embed(x).transpose(1, 2)).transpose(1, 2)
        h = h + self.attn["out_proj"](self.attn["q_proj"](h))
        return self.head(h + self.mlp(self.norm(h)))


def perturb_(parameters: list[nn.Parameter], scale: float = 0.3, seed: int = 1) -> None:
    """Move parameters away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter))
