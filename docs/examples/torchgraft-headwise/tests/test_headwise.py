"""Each bundled method on the layer: trained, merged, and taken back."""

from __future__ import annotations

import pytest
import torch
from torchgraft_headwise import HeadwiseLinear

import torchgraft as tg

METHODS = ["lora", "loraplus", "adalora", "dora"]


@pytest.mark.parametrize("method", METHODS)
def test_the_kit_passes_with_it(method: str) -> None:
    """`HeadwiseKind.examples` are among the layers that it tries."""
    report = tg.testing.check_plugin(method, only=["merge", "unmerge", "files", "save_load", "compile", "zero_rows"])
    assert report.passed == 6
    assert not [note for note in report.notes if "Headwise" in note]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_works_on_it(method: str) -> None:
    torch.manual_seed(0)
    layer, x = HeadwiseLinear(6, heads=3, size=4), torch.randn(5, 6)
    model = torch.nn.Sequential(layer)
    before = layer.weight.detach().clone()
    adapter = tg.apply(model, method, ["0"], rank=2)
    torch.testing.assert_close(model(x), torch.einsum("bi,hdi->bhd", x, before))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    trained = model(x)
    adapter.merge()
    torch.testing.assert_close(torch.einsum("bi,hdi->bhd", x, layer.weight), trained)
    adapter.unmerge()
    assert torch.equal(layer.weight, before)


def test_it_is_a_layer_that_can_be_selected() -> None:
    model = torch.nn.ModuleDict({"q_proj": HeadwiseLinear(6, 3, 4), "o_proj": torch.nn.Linear(12, 6)})
    assert [(site.name, site.kind) for site in tg.plan(model, ["*"]).sites] == [("q_proj", "Headwise"), ("o_proj", "Linear")]


def test_qlora_says_that_it_does_not() -> None:
    with pytest.raises(tg.AttachError, match="qlora does not work on Headwise layers"):
        tg.apply(torch.nn.Sequential(HeadwiseLinear(6, 3, 4)), "qlora", ["0"])
