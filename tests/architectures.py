"""More architectures, what they compute, and how a merge into their files is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import models
import torchgraft as tg
from references import tree

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
LLAMA = {**models.GROUPED, **models.SPECIAL}
IMAGE = 66
"""LLaVA's token that stands for a piece of the image."""
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "llama tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, num_local_experts=4)),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**TOWER), text_config=hf.LlamaConfig(**LLAMA), image_token_index=IMAGE)
    ),
    "clip": lambda: hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**models.TEXT, **models.SPECIAL, "projection_dim": 16},
            vision_config={**TOWER, "projection_dim": 16},
            projection_dim=16,
        )
    ),
}


def read(model: nn.Module, directory: Path) -> nn.Module:
    """Another model of the same class and dtype, from files; it must take all that is in them, and find all it needs there."""
    family: Any = type(model)
    again, info = family.from_pretrained(directory, dtype=model.dtype, output_loading_info=True)
    assert not any(info.values()), info
    return again.eval()


def inputs(model: nn.Module) -> dict[str, Tensor]:
    tokens = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(2))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(model.dtype)
    match model.config.model_type:
        case "vit":
            return {"pixel_values": pixels}
        case "clip":
            return {"input_ids": tokens, "pixel_values": pixels}
        case "llava":
            return {"input_ids": torch.cat([torch.full((2, 4), IMAGE), tokens], 1), "pixel_values": pixels}
        case "whisper":
            sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3)).to(model.dtype)
            return {"input_features": sound, "decoder_input_ids": tokens}
        case "t5":
            return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    return {"input_ids": tokens}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model(**inputs(model))
    return out.logits_per_image if "logits_per_image" in out else out.logits if "logits" in out else out[0]


def assert_merges(model: nn.Module, directory: Path, adapter: Path, tmp_path: Path, want: Tensor | None = None) -> None:
    """The merged files compute what the adapted `model` does, and not what the base did; unmerged they are the base's again.

    Weights in bfloat16 are the same there, and are computed with in float32: what differs is the rounding of the merged weights alone.
    """
    dtype = model.dtype
    report = tg.merge_checkpoint(directory, adapter, tmp_path / "merged")
    assert report.merged_tensors > 0
    before, after = (logits(read(model, path).float()) for path in (directory, tmp_path / "merged"))
    want = logits(model.float()) if want is None else want
    change, error = (want - before).norm(), (want - after).norm()
    assert change > 0.05 * want.norm()
    assert error < (3e-5 if dtype == torch.float32 else 0.05) * change
    tg.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(directory)
