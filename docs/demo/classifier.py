"""A sentence encoder with a linear head, its training and its accuracy."""

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
    """Mean-pooled encoder states, then a linear layer."""

    def __init__(self, encoder: nn.Module, directory: Path) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(LABELS))
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def embed(self, texts: list[str]) -> Tensor:
        """(batch, hidden)."""
        batch = self.tokenizer(texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        states = self.encoder(**batch).last_hidden_state
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, texts: list[str]) -> Tensor:
        """(batch, labels)."""
        return self.head(self.embed(texts))


@torch.no_grad()
def embed_all(model: Classifier, split: Split) -> Tensor:
    model.eval()
    groups = _of_like_length(split, 64)
    rows = torch.cat([model.embed([split.texts[i] for i in group]) for group in groups])
    return rows[torch.tensor([i for group in groups for i in group]).argsort()]


def accuracy(model: Classifier, split: Split) -> float:
    """The share of `split` that `model` labels right."""
    with torch.no_grad():
        guesses = model.head(embed_all(model, split)).argmax(-1)
    return float((guesses == torch.tensor(split.labels)).float().mean())


def train_head(model: Classifier, split: Split, epochs: int = 30) -> None:
    """Train the head alone, on features that the encoder as it stands gives once."""
    features, labels = embed_all(model, split), torch.tensor(split.labels)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    for _ in range(epochs):
        for chosen in torch.randperm(len(split)).split(256):
            _step(optimizer, model.head(features[chosen]), labels[chosen])


def train(model: Classifier, split: Split, groups: list[dict[str, Any]], each_step: Callable[[float], None]) -> None:
    """One pass over `split`; the learning rate rises over the first tenth, then falls to zero."""
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
    """Places in `split` in groups of `size`, with texts of like length together: less padding is quicker."""
    order = sorted(range(len(split)), key=lambda i: len(split.texts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _step(optimizer: torch.optim.Optimizer, logits: Tensor, labels: Tensor) -> float:
    loss = nn.functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
