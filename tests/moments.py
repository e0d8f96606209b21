"""The optimizers whose state AdaLoRA resizes, and the names of that state."""

from __future__ import annotations

from collections.abc import Callable

import torch

import torchgraft as tg

OPTIMIZERS: dict[str, Callable[[tg.Adapter], torch.optim.Optimizer]] = {
    "Adam": lambda adapter: torch.optim.Adam(adapter.parameters(), lr=0.0, amsgrad=True),
    "AdamW, one by one": lambda adapter: torch.optim.AdamW(adapter.parameters(), lr=0.0, foreach=False),
    "SGD": lambda adapter: torch.optim.SGD(adapter.parameters(), lr=0.0, momentum=0.9),
    "RMSprop": lambda adapter: torch.optim.RMSprop(adapter.parameters(), lr=0.0, momentum=0.5, centered=True),
    "Adagrad": lambda adapter: torch.optim.Adagrad(adapter.parameters(), lr=0.0),
    "bitsandbytes AdamW32bit": lambda adapter: adapter.optimizer("adamw_32bit", lr=0.0),
}
MEANS = {"exp_avg": 0.1, "momentum_buffer": 1.0, "grad_avg": 0.01, "state1": 0.1}
"""Names under which optimizers store the mean of the gradients → its share of the gradient after one step."""
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "state2"}
