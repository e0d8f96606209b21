"""An adapter that depends on the weight, trained over another one: what its files say, and where they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torchgraft as tg
from models import perturb_

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6))


def stack(directory: Path, *, merge_first: bool) -> torch.Tensor:
    """DoRA over DoRA, both saved; the output of the two together."""
    model = base()
    for number, name in enumerate(("one", "two")):
        adapter = tg.apply(model, "dora", ["0"], name=name, rank=2)
        perturb_(adapter.parameters(), seed=number)
        if name == "one":
            adapter.save(directory / "one")
            if merge_first:
                adapter.merge()
    adapter.save(directory / "two")
    return model(X).detach()


def files(directory: Path) -> Path:
    (directory / "base").mkdir()
    state = {f"q_proj.{key.rpartition('.')[2]}": value for key, value in base().state_dict().items()}
    save_file(state, directory / "base" / "model.safetensors", metadata={"format": "pt"})
    return directory / "base"


@pytest.mark.parametrize("merge_first", [False, True])
def test_both_loaded_in_order_are_the_same_again(merge_first: bool, tmp_path: Path) -> None:
    want = stack(tmp_path, merge_first=merge_first)
    model = base()
    tg.load(model, tmp_path / "one", name="one")
    if merge_first:
        tg.adapters(model)["one"].merge()
    tg.load(model, tmp_path / "two", name="two")
    torch.testing.assert_close(model(X), want)


def test_the_upper_one_alone_is_reported(tmp_path: Path) -> None:
    stack(tmp_path, merge_first=False)
    with pytest.warns(tg.TorchgraftWarning, match="0: it was trained over one, and depends on that"):
        tg.load(base(), tmp_path / "two")


def test_the_upper_one_made_on_a_merged_lower_one_is_refused_by_the_plain_base(tmp_path: Path) -> None:
    stack(tmp_path, merge_first=True)
    with pytest.raises(tg.PairingError, match="not the one that the adapter was made for"):
        tg.load(base(), tmp_path / "two")


def test_both_are_merged_into_files_one_after_the_other(tmp_path: Path) -> None:
    checkpoint, model = files(tmp_path), nn.ModuleDict({"q_proj": base()[0]})
    one = tg.apply(model, "dora", ["q_proj"], name="one", rank=2)
    perturb_(one.parameters())
    one.save(tmp_path / "one")
    one.merge()
    two = tg.apply(model, "dora", ["q_proj"], name="two", rank=2)
    perturb_(two.parameters(), seed=2)
    two.save(tmp_path / "two")
    want = model["q_proj"](X)
    tg.merge_checkpoint(checkpoint, tmp_path / "one", tmp_path / "first")
    tg.merge_checkpoint(tmp_path / "first", tmp_path / "two", tmp_path / "second")
    with pytest.raises(tg.PairingError, match="not the one that the adapter was made for"):
        tg.merge_checkpoint(checkpoint, tmp_path / "two", tmp_path / "wrong")
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "second" / "model.safetensors")
    torch.testing.assert_close(X @ merged["q_proj.weight"].T + merged["q_proj.bias"], want)


def test_what_lies_under_a_merged_adapter_cannot_be_switched() -> None:
    model = base()
    lower, upper = (tg.apply(model, method, ["0"], name=method, rank=2) for method in ("lora", "dora"))
    perturb_([*lower.parameters(), *upper.parameters()])
    lower.active = False
    upper.merge()
    with pytest.raises(tg.MergeError, match="attached after 'lora' is merged, and the two depend on their order"):
        lower.active = True
    upper.unmerge()
    lower.active = True


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_merge_within_autocast_is_as_exact_as_without(method: str) -> None:
    model = base()
    adapter = tg.apply(model, method, ["0"], rank=2)
    perturb_(adapter.parameters())
    want, before = model(X), model[0].weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        adapter.merge()
    torch.testing.assert_close(model(X), want)
    adapter.unmerge()
    assert model[0].weight.equal(before)
