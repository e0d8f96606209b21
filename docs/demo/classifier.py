"""Train and evaluate a sentence encoder with a linear head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from data import LABELS, Split
from torch import Tensor, nn
from transformers import AutoTokenizer

MAX_TOKENS = 40
BATCH = 32


class Classifier(nn.Module):
    """Classify a text by a linear layer on the mean-pooled encoder states."""

    def __init__(self, encoder: nn.Module, directory: Path) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(LABELS))
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def embed(self, texts: list[str]) -> Tensor:
        """Return sentence vectors (batch, hidden)."""
        batch = self.tokenizer(texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        states = self.encoder(**batch).last_hidden_state
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, texts: list[str]) -> Tensor:
        """Return logits (batch, labels)."""
        return self.head(self.embed(texts))


@torch.no_grad()
def embed_all(model: Classifier, split: Split) -> Tensor:
    model.eval()
    groups = _of_like_length(split, 64)
    rows = torch.cat([model.embed([split.texts[i] for i in group]) for group in groups])
    return rows[torch.tensor([i for group in groups for i in group]).argsort()]


def accuracy(model: Classifier, split: Split) -> float:
    """Return the share of `split` that `model` labels correctly."""
    with torch.no_grad():
        guesses = model.head(embed_all(model, split)).argmax(-1)
    return float((guesses == torch.tensor(split.labels)).float().mean())


def train_head(model: Classifier, split: Split, epochs: int = 30) -> None:
    """Train only the head, on features that the frozen encoder computes once."""
    features, labels = embed_all(model, split), torch.tensor(split.labels)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    for _ in range(epochs):
        for chosen in torch.randperm(len(split)).split(256):
            _step(optimizer, model.head(features[chosen]), labels[chosen])


def train(model: Classifier, split: Split, groups: list[dict[str, Any]], each_step: Callable[[float], None]) -> None:
    """Train for one epoch; the learning rate rises over the first tenth of the steps, then decays to zero."""
    optimizer = torch.optim.AdamW(groups)
    batches = list(_batches(split))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=len(batches), pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for texts, labels in batches:
        each_step(_step(optimizer, model(texts), labels))
        schedule.step()


def _batches(split: Split) -> Iterable[tuple[list[str], Tensor]]:
    groups = _of_like_length(split, BATCH)
    for place in torch.randperm(len(groups)):
        yield [split.texts[i] for i in groups[place]], torch.tensor([split.labels[i] for i in groups[place]])


def _of_like_length(split: Split, size: int) -> list[list[int]]:
    """Return indices into `split` in groups of `size` texts of similar length, which need less padding."""
    order = sorted(range(len(split)), key=lambda i: len(split.texts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _step(optimizer: torch.optim.Optimizer, logits: Tensor, labels: Tensor) -> float:
    loss = nn.functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
