"""Time a batch whose samples use different adapters, with torchgraft and PEFT, and one in which all use the same adapter."""

from __future__ import annotations

import random
from typing import Any

import peft
import torch
from speed_rows import ALPHA, LINEARS, RANK, base, timed, with_torchgraft

import torchgraft as tg

HIDDEN, LAYERS, TOKENS, SAMPLES = 768, 2, 32, 16
COUNTS = (1, 2, 4, 8, 16)
"""Numbers of different adapters in the batch."""


def measure(repetitions: int) -> dict[str, Any]:
    names = [f"a{number}" for number in range(max(COUNTS))]
    grafted, bare = base(HIDDEN, LAYERS, 32, torch.float32).eval(), base(HIDDEN, LAYERS, 32, torch.float32).eval()
    single = with_torchgraft(base(HIDDEN, LAYERS, 32, torch.float32), "lora", torch.float32).eval()
    for name in names:
        tg.apply(grafted, "lora", LINEARS, rank=RANK, alpha=ALPHA, name=name, init="swapped")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, init_lora_weights=False)
    with_peft = peft.get_peft_model(base(HIDDEN, LAYERS, 32, torch.float32), config, adapter_name=names[0])
    for name in names[1:]:
        with_peft.add_adapter(name, config)
    with_peft.eval()
    x = torch.randn(SAMPLES, TOKENS, HIDDEN)

    def routed(count: int) -> None:
        with tg.per_sample(grafted, [names[sample % count] for sample in range(SAMPLES)]):
            grafted(inputs_embeds=x)

    def peft_routed(count: int) -> None:
        with_peft(inputs_embeds=x, adapter_names=[names[sample % count] for sample in range(SAMPLES)])

    calls: dict[str, Any] = {"frozen": lambda: bare(inputs_embeds=x), "one adapter, active": lambda: single(inputs_embeds=x)}
    for count in COUNTS:
        calls |= {f"per_sample, {count}": lambda count=count: routed(count), f"PEFT, {count}": lambda count=count: peft_routed(count)}
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for repetition in range(repetitions + 2):
            for name in random.sample(list(calls), len(calls)):
                seconds = timed(calls[name])
                if repetition > 1:
                    found[name].append(seconds)
    return {"samples": SAMPLES, "tokens": TOKENS, "hidden": HIDDEN, "times": found}
