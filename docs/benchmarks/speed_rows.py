"""Build and time Llama-shaped models: frozen, with LoRA or DoRA of torchgraft, and with LoRA or DoRA of PEFT."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import torchgraft as tg

RANK, ALPHA, SEED = 16, 32, 0
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FROZEN, LORA, PEFT_LORA, DORA, PEFT_DORA = "frozen", "LoRA", "PEFT's LoRA", "DoRA", "PEFT's DoRA"
ROWS = (FROZEN, LORA, PEFT_LORA, DORA, PEFT_DORA)
Times = dict[str, list[float]]


def base(hidden: int, layers: int, bits: int, dtype: torch.dtype) -> nn.Module:
    """Return a frozen model with random weights, in `dtype` or in NF4 with `dtype` as compute dtype."""
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=1000,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    if bits == 4:
        how = tg.Quantization(compute_dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name in LINEARS:
                    setattr(parent, name, tg.quantized_linear(child, how, name))
    return model


def with_torchgraft(model: nn.Module, method: str, dtype: torch.dtype) -> nn.Module:
    adapter = tg.apply(model, method, LINEARS, rank=RANK, alpha=ALPHA, dtype=str(dtype).removeprefix("torch."))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def with_peft(model: nn.Module, dtype: torch.dtype, *, dora: bool) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, use_dora=dora, init_lora_weights=False)
    found = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return found


def rows(hidden: int, layers: int, bits: int, dtype: torch.dtype) -> Mapping[str, Callable[[], nn.Module]]:
    def make() -> nn.Module:
        return base(hidden, layers, bits, dtype)

    return {
        FROZEN: make,
        LORA: lambda: with_torchgraft(make(), "qlora" if bits == 4 else "lora", dtype),
        PEFT_LORA: lambda: with_peft(make(), dtype, dora=False),
        DORA: lambda: with_torchgraft(make(), "dora", dtype),
        PEFT_DORA: lambda: with_peft(make(), dtype, dora=True),
    }


def step(model: nn.Module, embedded: Tensor) -> None:
    """Run forward and backward, with gradients of the activations down to the embeddings."""
    x = embedded.clone().requires_grad_()
    model(inputs_embeds=x).logits.float().square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(hidden: int, layers: int, tokens: int, bits: int, dtype: torch.dtype, repetitions: int) -> dict[str, Times]:
    """Return the seconds of a training step and of a forward in eval mode, with the rows shuffled in each repetition."""
    models = {row: make() for row, make in rows(hidden, layers, bits, dtype).items()}
    embedded = torch.randn(1, tokens, hidden).to(dtype)
    steps: Times = {row: [] for row in models}
    forwards: Times = {row: [] for row in models}
    for repetition in range(repetitions + 2):
        for row in random.sample(list(models), len(models)):
            model = models[row].train()
            one = timed(lambda model=model: step(model, embedded))  # type: ignore[misc]
            model.eval()
            with torch.no_grad():
                model(inputs_embeds=embedded)  # fills the caches of methods that have some in eval mode
                other = timed(lambda model=model: model(inputs_embeds=embedded))  # type: ignore[misc]
            if repetition > 1:
                steps[row].append(one)
                forwards[row].append(other)
    return {"step": steps, "forward": forwards}


def peak_of(row: str, hidden: int, layers: int, tokens: int, bits: int, dtype: torch.dtype) -> int:
    """Return the peak memory of a step in bytes, weights included, less the memory in use before the model was built."""
    from memory import peak, reset_peak, resident

    before = resident()
    model = rows(hidden, layers, bits, dtype)[row]().train()
    embedded = torch.randn(1, tokens, hidden).to(dtype)
    step(model, embedded)
    reset_peak()
    step(model, embedded)
    return peak() - before
