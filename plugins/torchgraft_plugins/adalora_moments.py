"""What both allocators of AdaLoRA share: the moments of directions that come and go, and the history."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torchgraft as tg

if TYPE_CHECKING:
    from torch import Tensor

HISTORY = "history"


def carry_rows(rows: list[int]) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Moments of the directions that were at `rows` before; -1 is a new one.

    A new one starts without momentum, and with the mean square of the others: with 0 its first steps would be too large.
    """
    import torch

    def by_rows(moment: Tensor, power: int) -> Tensor:
        start = moment.mean(0, keepdim=True) if power == 2 and len(moment) else moment.new_zeros(1, *moment.shape[1:])
        return torch.cat([moment, start])[torch.tensor(rows, dtype=torch.long, device=moment.device)]

    return {"A": by_rows, "E": by_rows, "B": lambda moment, power: by_rows(moment.T, power).T}


def note(adapter: tg.Adapter, step: int, what: str) -> None:
    ranks = {name: part.config.r for name, part in adapter.parts.items()}
    adapter.state.setdefault(HISTORY, []).append({"step": int(step), "what": what, "ranks": ranks})
