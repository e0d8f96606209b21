"""Time attaching LoRA to a model of the shape of Llama 3 70B on the meta device: 560 layers."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from speed_rows import LINEARS, RANK, timed
from torch import nn

import torchgraft as tg

GIANT = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
GIANT |= {"num_key_value_heads": 8, "vocab_size": 128256}


def attach(repetitions: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {"torchgraft": [], "PEFT": []}
    sites = 0
    for repetition in range(repetitions + 1):
        for name, times in found.items():
            model, peak = blank(), []
            call = (
                (lambda model=model: tg.apply(model, "lora", LINEARS, rank=RANK))
                if name == "torchgraft"
                else (lambda model=model: with_peft(model))
            )  # type: ignore[misc]
            peak.append(timed(call))
            if repetition:
                times += peak
            if name == "torchgraft":
                sites = len(tg.adapters(model)["default"].sites)
    return {"sites": sites, **found}


def blank() -> nn.Module:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GIANT))


def with_peft(model: nn.Module) -> None:
    with torch.device("meta"):
        peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=LINEARS), low_cpu_mem_usage=True)
