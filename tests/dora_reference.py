"""DoRA's weight written out in float64, and adapters to compare with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
from torch import Tensor, nn

import torchgraft as tg
from models import perturb_
from one_layer import ALPHA, RANK, SCALE
from torchgraft_plugins import dora


def adapted(module: nn.Module, **options: Any) -> tuple[nn.Sequential, tg.Adapter]:
    """Return a model of a copy of that layer with a perturbed DoRA, and the adapter."""
    model = nn.Sequential(deepcopy(module))
    adapter = tg.apply(model, "dora", targets=["@all"], **{"rank": RANK, "alpha": ALPHA, **options})
    move_(adapter)
    return model, adapter


def move_(adapter: tg.Adapter, seed: int = 1) -> None:
    """Move the parameters away from their start, except the column of a padding row, which gets no gradient."""
    perturb_(adapter.parameters(), seed=seed)
    for part in adapter.parts.values():
        if part.site.padding_idx is not None:
            part.A.data[:, part.site.padding_idx] = 0


def leaves(part: Any, *names: str) -> list[Tensor]:
    return [getattr(part, name).detach().double().requires_grad_() for name in names]


def turned(v: Tensor, m: Tensor) -> Tensor:
    """m·V/‖V‖ by row. The norm is a constant (§4.3 of the paper); a row that is zero has no direction and stays zero."""
    norm = v.detach().norm(dim=1)
    return m[:, None] / norm.where(norm > 0, 1)[:, None] * v


def weight_with(part: Any, matrix: Tensor) -> Tensor:
    """`matrix` (out, in) with one adapter in it, LoRA or DoRA, in float64."""
    v = matrix + SCALE * part.B.detach().double() @ part.A.detach().double()
    return turned(v, part.m.detach().double()) if part.method == "dora" else v


@contextmanager
def norms_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tg.Site]]:
    calls: list[tg.Site] = []
    real = dora._norm

    def counted(site: tg.Site, *rest: Any) -> Tensor:
        calls.append(site)
        return real(site, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(dora, "_norm", counted)
        yield calls
