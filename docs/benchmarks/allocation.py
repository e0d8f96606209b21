"""Measure the cost of AdaLoRA's rank allocation: `budget` compared with PEFT's, `energy` compared with a training step.

Run it with `python docs/benchmarks/allocation.py`; it takes a minute. One thread, random weights and gradients. Both adapters follow
the same schedule from rank 12 to 8. torchgraft resizes parameters and optimizer moments; PEFT sets entries to 0.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from statistics import median, quantiles
from typing import Any

import peft
import torch
import transformers
from torch import nn

import torchgraft as tg

SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12, "vocab_size": 1000}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
START, END, INTERVAL = 12, 8, 50
ORDINARY = 9
"""Steps without a decision that are measured before each step with one."""
BATCH = (4, 64)
TORCHGRAFT, PEFT = "torchgraft", "peft"
ROWS = {
    "ordinary": "a step without a decision",
    "allocating": "a step with a decision",
    "interval": f"mean of {INTERVAL} steps, one with a decision",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print all measurements")
    arguments = parser.parse_args()
    found = measure(arguments.repetitions)
    print(json.dumps(found, indent=1) if arguments.json else table(found))


def measure(repetitions: int) -> dict[str, Any]:
    """Return quartiles [first, median, third] of milliseconds, and of the ratios torchgraft / PEFT and decision / steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"repetitions": repetitions, "budget": budget(repetitions), "energy": energy(repetitions)}
    finally:
        torch.set_num_threads(threads)


def budget(repetitions: int) -> dict[str, dict[str, list[float]]]:
    total = (repetitions + 2) * INTERVAL
    takers = {TORCHGRAFT: with_torchgraft(total), PEFT: with_peft(total)}
    runs = [repetition(takers, (number + 1) * INTERVAL) for number in range(repetitions + 1)][1:]  # the first is a warm-up
    return {
        row: {name: spread(run[name][row] for run in runs) for name in takers}
        | {"ratio": spread(run[TORCHGRAFT][row] / run[PEFT][row] for run in runs)}
        for row in ROWS
    }


Taker = tuple[Callable[[int], None], Callable[[], list[nn.Parameter]]]
"""Function that takes a step of a given number, and function that returns the parameters."""


def repetition(takers: dict[str, Taker], decision: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of the steps before `decision` and of that step; torchgraft and PEFT take turns."""
    taken: dict[str, list[float]] = {name: [] for name in takers}
    for step in range(decision - ORDINARY, decision + 1):
        for name in sorted(takers, reverse=bool(step % 2)):
            take, parameters = takers[name]
            for parameter in parameters():
                parameter.grad = torch.randn_like(parameter)
            taken[name].append(milliseconds(take, step))
    return {name: costs(median(ordinary), last) for name, (*ordinary, last) in taken.items()}


def costs(ordinary: float, allocating: float) -> dict[str, float]:
    return {"ordinary": ordinary, "allocating": allocating, "interval": ((INTERVAL - 1) * ordinary + allocating) / INTERVAL}


def with_torchgraft(total: int) -> Taker:
    options: dict[str, Any] = {"allocator": "budget", "target_rank": END, "interval": INTERVAL, "total_steps": total}
    adapter = tg.apply(llama(), "adalora", TARGETS, rank=START, warmup_steps=0, final_steps=1, **options)
    optimizer = ready(adapter.parameters())
    return (lambda step: adapter.step(optimizer, step=step)), adapter.parameters


def with_peft(total: int) -> Taker:
    schedule: dict[str, Any] = {"tinit": 0, "tfinal": 1, "deltaT": INTERVAL, "total_step": total}
    model = peft.get_peft_model(llama(), peft.AdaLoraConfig(init_r=START, target_r=END, target_modules=TARGETS, **schedule))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ready(trained)
    return model.base_model.update_and_allocate, lambda: trained


def energy(repetitions: int) -> dict[str, Any]:
    """Time a decision that changes every site and one that changes none, and a training step of the same repetition."""
    model = llama()
    adapter = tg.apply(model, "adalora", TARGETS, rank=START, interval=INTERVAL)
    made = model, ready(adapter.parameters())
    runs = [energy_repetition(*deepcopy(made)) for _ in range(repetitions + 1)][1:]
    found: dict[str, Any] = {row: spread(run[row] for run in runs) for row in runs[0]}
    shares = {row: spread(run[row] / (INTERVAL * run["step"]) for run in runs) for row in ("changed", "unchanged")}
    return found | {"share": shares, "tokens": list(BATCH)}


def energy_repetition(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    adapter = tg.adapters(model)["default"]
    tokens = torch.randint(SHAPE["vocab_size"], BATCH)

    def train() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    found = {"step": milliseconds(train)}
    with torch.no_grad():
        for part in adapter.parts.values():
            part.B[:, END:] *= 1e-3
    found |= {row: milliseconds(adapter.step, optimizer, INTERVAL) for row in ("changed", "unchanged")}
    assert {part.config.r for part in adapter.parts.values()} == {END}
    return found


def llama() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    return model


def ready(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer with moments, after moving the parameters away from their initial values."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def milliseconds(call: Callable[..., object], *arguments: Any) -> float:
    started = time.perf_counter()
    call(*arguments)
    return 1000 * (time.perf_counter() - started)


def spread(values: Iterable[float]) -> list[float]:
    """Return the first quartile, the median and the third quartile."""
    return [round(value, 5) for value in quantiles(values, n=4)]


def table(found: dict[str, Any]) -> str:
    def shown(quartiles: list[float], form: str = ".2f") -> str:
        low, middle, high = (format(value, form) for value in quartiles)
        return f"{middle} ({low} to {high})"

    lines = ["| budget | torchgraft, ms | PEFT, ms | torchgraft / PEFT |", "|---|--:|--:|--:|"]
    lines += [f"| {text} | {' | '.join(map(shown, found['budget'][row].values()))} |" for row, text in ROWS.items()]
    own = found["energy"]
    lines += ["", f"| energy | ms | of {INTERVAL} training steps, {shown(own['step'], '.0f')} ms each |", "|---|--:|--:|"]
    lines += [f"| every site {row} | {shown(own[row])} | {shown(own['share'][row], '.3%')} |" for row in ("changed", "unchanged")]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
