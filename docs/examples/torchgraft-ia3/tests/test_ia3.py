"""The kit's checks, one test each; and what the kit cannot know: which formula it should be."""

from __future__ import annotations

import pytest
import torch

import torchgraft as tg

check = tg.testing.conformance("ia3")


def test_conforms(check) -> None:
    check()


@pytest.mark.parametrize("side", ["output", "input"])
def test_it_is_the_formula_of_the_paper(side: str) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    model = torch.nn.Sequential(layer)
    adapter = tg.apply(model, "ia3", ["0"], side=side)
    (factors,) = adapter.parameters()
    torch.nn.init.uniform_(factors, 0.5, 2)
    w, b, factor = (tensor.detach().clone() for tensor in (layer.weight, layer.bias, factors.double()))
    expected = factor * (x @ w.T + b) if side == "output" else (factor * x) @ w.T + b
    torch.testing.assert_close(model(x), expected)
    adapter.merge()
    torch.testing.assert_close(layer.weight, factor[:, None] * w if side == "output" else w * factor)
    torch.testing.assert_close(model(x), expected)
