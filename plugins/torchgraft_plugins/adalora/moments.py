"""Code that both allocators share: optimizer moments when directions are removed or added, and the history of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torchgraft as tg

if TYPE_CHECKING:
    from torch import Tensor

HISTORY = "history"


def carry_rows(places: Tensor) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Return, for each tensor, how its moments follow: direction i was at index `places[i]` before, or is new (-1).

    A new direction starts without momentum and with the mean squared gradient of the others: with 0, its first steps would be too
    large.
    """
    import torch

    fresh = bool((places < 0).any())

    def along(axis: int, moment: Tensor, power: int) -> Tensor:
        index = places.to(moment.device)
        if fresh:
            size = moment.shape[axis]
            start = moment.new_zeros([1 if at == axis else length for at, length in enumerate(moment.shape)])
            moment = torch.cat([moment, moment.mean(axis, keepdim=True) if power == 2 and size else start], axis)
            index = index % (size + 1)
        return moment.index_select(axis, index)

    return {"A": partial(along, 0), "E": partial(along, 0), "B": partial(along, 1)}


def note(adapter: tg.Adapter, step: int, what: str) -> None:
    ranks = {name: part.config.r for name, part in adapter.parts.items()}
    adapter.state.setdefault(HISTORY, []).append({"step": int(step), "what": what, "ranks": ranks})
