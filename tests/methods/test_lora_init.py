"""How A and B start, what follows for the first steps of training, and options that are refused."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from math import inf, nan, prod, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import torchgraft as tg
from models import Plain, perturb_
from one_layer import DTYPES, TOKENS, canonical, input_of, output, plain

HARMLESS = ("kaiming", "gaussian", "orthogonal", "swapped", "pissa")
KINDS = ("linear", "linear-square", "hf-conv1d", "hf-conv1d-square", "embedding", "conv1d-groups", "conv2d-depthwise", "conv3d-plain")


def start(module: nn.Module, **options: Any) -> tuple[nn.Sequential, Any]:
    """A model of a copy of that layer with an adapter as `apply` makes it, and what it puts on the layer."""
    model = nn.Sequential(deepcopy(module))
    return model, tg.apply(model, "lora", targets=["@all"], **options).parts["0"]


@pytest.mark.parametrize("init", HARMLESS)
@pytest.mark.parametrize("layer", KINDS)
def test_training_starts_at_the_base(layer: str, init: str) -> None:
    module = plain(layer).requires_grad_(False)  # torch rounds in another order where a weight needs a gradient
    model, part = start(module, rank=2, alpha=6, init=init)
    x = input_of(module)
    if init == "pissa":
        torch.testing.assert_close(model(x), module(x), atol=2e-6, rtol=1e-5)
        assert (part.B @ part.A).abs().max() > 0.05
    else:
        assert torch.equal(model(x), module(x))
        assert (part.A.abs().max() > 0) != (part.B.abs().max() > 0), "one of the two is zero, and only one"
    assert torch.equal(model[0].weight, module.weight)


@pytest.mark.parametrize("layer", KINDS)
def test_both_gaussian_changes_the_output_and_says_so(layer: str) -> None:
    module = plain(layer)
    with pytest.warns(tg.TorchgraftWarning, match=r"both-gaussian.*output changes before any training"):
        model, part = start(module, rank=2, alpha=6, init="both-gaussian")
    x = input_of(module)
    want = output(module, canonical(module) + 3.0 * part.B.double() @ part.A.double(), x)
    torch.testing.assert_close(model(x).double(), want, atol=1e-4, rtol=0)
    assert (model(x) - module(x)).abs().max() > 0.5


FAN_IN: dict[str, tuple[Callable[[], nn.Module], int]] = {  # how many inputs reach one output at a time
    "linear": (lambda: nn.Linear(400, 30), 400),
    "hf-conv1d": (lambda: Conv1D(30, 300), 300),
    "conv": (lambda: nn.Conv2d(64, 32, (3, 5)), 64 * 15),
    "grouped conv": (lambda: nn.Conv1d(64, 32, 9, groups=4), 16 * 9),
    "embedding": (lambda: nn.Embedding(500, 30), 1),
}


@pytest.mark.parametrize("name", FAN_IN)
def test_kaiming_is_uniform_up_to_one_over_the_root_of_fan_in(name: str) -> None:
    make, fan_in = FAN_IN[name]
    _, part = start(make(), rank=20)
    a, bound = part.A.detach().double().flatten(), 1 / sqrt(fan_in)
    deviation = 1 / sqrt(12 * len(a))  # of a mean of uniform numbers, in widths of their range
    assert a.abs().max() <= bound * (1 + 1e-6)
    assert a.abs().max() > 0.99 * bound
    assert abs(a.mean()) < 5 * deviation * 2 * bound
    assert abs(a.abs().mean() - bound / 2) < 5 * deviation * bound
    assert not part.B.any()


@pytest.mark.parametrize("sigma", [1.0, 0.3])
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize(("init", "drawn", "zero"), [("gaussian", "A", "B"), ("swapped", "B", "A"), ("both-gaussian", "AB", "")])
@pytest.mark.filterwarnings("ignore:init both-gaussian")
def test_gaussian_entries_have_variance_sigma_squared_over_r(init: str, drawn: str, zero: str, rank: int, sigma: float) -> None:
    _, part = start(nn.Linear(900, 800), rank=rank, init=init, sigma=sigma)
    for name in drawn:
        z = getattr(part, name).detach().double().flatten() * sqrt(rank) / sigma  # should be N(0, 1)
        root = sqrt(len(z))
        assert abs(z.mean()) < 5 / root
        assert abs(z.square().mean() - 1) < 5 * sqrt(2) / root
        assert abs(z.pow(4).mean() - 3) < 5 * sqrt(96) / root
        # What σ²/r is for: the length of A·x does not depend on r.
        assert abs(getattr(part, name).detach().double().square().sum() / (len(z) / rank) - sigma**2) < 5 * sqrt(2) / root * sigma**2
    for name in zero:
        assert not getattr(part, name).any()


@pytest.mark.parametrize("layer", KINDS)
def test_orthogonal_rows_are_orthonormal(layer: str) -> None:
    _, part = start(plain(layer), rank=4, init="orthogonal")
    a = part.A.detach().double()
    torch.testing.assert_close(a @ a.T, torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=0)
    assert not part.B.any()


@pytest.mark.parametrize(
    ("init", "moves"), [("kaiming", "B"), ("gaussian", "B"), ("orthogonal", "B"), ("swapped", "A"), ("pissa", "AB"), ("zero by hand", "")]
)
def test_which_factor_gets_a_gradient_first(init: str, moves: str) -> None:
    module = plain("linear")
    model, part = start(module, rank=2, init="kaiming" if init == "zero by hand" else init)
    if init == "zero by hand":
        part.A.data.zero_()
    x = input_of(module)
    optimizer = torch.optim.SGD([part.A, part.B], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        moving = "".join(name for name in "AB" if getattr(part, name).grad.abs().max() > 1e-6)
        # From the second step on both train, unless both started at zero: then neither ever does.
        assert moving == (moves if step == 0 or not moves else "AB")
        optimizer.step()


@pytest.mark.parametrize("init", ["zero", "both-zero", "both zero"])
def test_both_zero_is_refused_with_the_reason(init: str) -> None:
    with pytest.raises(tg.ConfigError, match=r"gradients of both are always zero.*use kaiming"):
        tg.apply(Plain(), "lora", init=init)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", KINDS)
def test_pissa_starts_at_the_top_singular_directions(layer: str, dtype: str) -> None:
    module = plain(layer, dtype)
    model, part = start(module, rank=3, alpha=6, init="pissa")
    u, s, vh = torch.linalg.svd(canonical(module), full_matrices=False)
    a, b = part.A.detach().double(), part.B.detach().double()
    torch.testing.assert_close(2.0 * b @ a, u[:, :3] * s[:3] @ vh[:3], atol=1e-5, rtol=0)
    for factor in (a.norm(dim=1), b.norm(dim=0)):
        torch.testing.assert_close(factor, (s[:3] / 2).sqrt(), atol=1e-5, rtol=0)
    assert torch.equal(model[0].weight, module.weight)
    x, eps = input_of(module), torch.finfo(DTYPES[dtype]).eps
    assert (model(x) - module(x)).abs().max() <= max(4 * eps, 1e-5)


@pytest.mark.parametrize("layer", KINDS)
def test_pissa_trains_as_on_the_residual_weight(layer: str) -> None:
    module = plain(layer, "float64")
    model, part = start(module, rank=2, alpha=6, init="pissa", dtype="float64")
    u, s, vh = torch.linalg.svd(canonical(module), full_matrices=False)
    root = (s[:2] / 3).sqrt()
    a, b = (root[:, None] * vh[:2]).requires_grad_(), (u[:, :2] * root).requires_grad_()
    residual = canonical(module) - 3.0 * (b @ a).detach()
    x = input_of(module)
    ours, theirs = torch.optim.SGD([part.A, part.B], lr=0.1), torch.optim.SGD([a, b], lr=0.1)
    for _ in range(3):
        for optimizer, h in ((ours, model(x)), (theirs, output(module, residual + 3.0 * b @ a, x))):
            optimizer.zero_grad()
            (h - 1).square().mean().backward()
            optimizer.step()
        # The signs of singular vectors are free, so products are compared.
        torch.testing.assert_close(part.B @ part.A, b @ a, atol=1e-10, rtol=0)
        torch.testing.assert_close(model(x), output(module, residual + 3.0 * b @ a, x), atol=1e-9, rtol=0)
    assert (b @ a - part.B0 @ part.A0).abs().max() > 0.001
    assert torch.equal(model[0].weight, module.weight)


@pytest.mark.parametrize("reader", ["torchgraft", "peft's files alone"])
@pytest.mark.parametrize("layer", KINDS)
def test_a_trained_pissa_adapter_is_saved_and_merged_with_what_it_started_from(layer: str, reader: str, tmp_path: Path) -> None:
    module = plain(layer)
    model, part = start(module, rank=2, alpha=6, init="pissa")
    adapter = tg.adapters(model)["default"]
    perturb_(adapter.parameters())
    x = input_of(module)
    product, began = (b.detach().double() @ a.detach().double() for b, a in ((part.B, part.A), (part.B0, part.A0)))
    want = output(module, canonical(module) + 3.0 * (product - began), x)
    adapter.save(tmp_path)
    adapter.merge()
    torch.testing.assert_close(model(x).double(), want, atol=1e-4, rtol=0)
    if reader != "torchgraft":
        (tmp_path / "torchgraft.json").unlink()
    again = nn.Sequential(deepcopy(module))
    loaded = tg.load(again, tmp_path).parts["0"]
    torch.testing.assert_close(again(x).double(), want, atol=1e-4, rtol=0)
    if reader == "torchgraft":
        assert all(torch.equal(tensor, part.tensors()[name]) for name, tensor in loaded.tensors().items())
        assert set(loaded.tensors()) == {"A", "B", "A0", "B0"}


def factors_of(targets: list[str], **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(tg.apply(Plain(), "lora", targets=targets, rank=2, **options).named_parameters())


@pytest.mark.parametrize("init", [init for init in HARMLESS if init != "pissa"])
def test_a_seed_fixes_a_sites_numbers_whatever_else_is_selected(init: str) -> None:
    drawn = "B" if init == "swapped" else "A"
    whole, alone = factors_of(["@all"], init=init, seed=3), factors_of(["mlp.2", "q_proj"], init=init, seed=3)
    assert len(alone) == 4
    assert all(torch.equal(tensor, whole[name]) for name, tensor in alone.items())
    other = factors_of(["@all"], init=init, seed=4)
    for name in (name for name in whole if name.endswith(drawn)):
        assert not torch.equal(whole[name], other[name]), name
    same_shape = whole[f"attn.q_proj.{drawn}"], whole[f"attn.out_proj.{drawn}"]
    assert not torch.equal(*same_shape), "two sites must not start alike"


def test_attaching_leaves_torchs_own_random_numbers_alone() -> None:
    model = Plain()
    before = torch.get_rng_state()
    tg.apply(model, "lora", targets=["@all"], rank=2, init="orthogonal")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init", HARMLESS)
def test_only_the_adapter_trains(init: str) -> None:
    torch.manual_seed(0)
    base = Plain()
    model = deepcopy(base)
    adapter = tg.apply(model, "lora", targets=["@all"], rank=2, init=init)
    own, before = dict(adapter.named_parameters()), [parameter.detach().clone() for parameter in adapter.parameters()]
    fixed = {name: tensor.clone() for name, tensor in model.named_buffers()}
    assert {name.rpartition(".")[2] for name in own} == {"A", "B"}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own.values()}
    assert adapter.count().trainable == sum(2 * sum(canonical(model.get_submodule(site)).shape) for site in adapter.parts)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.get_parameter(name), tensor), name
        assert model.get_parameter(name).grad is None, name
    assert all(torch.equal(tensor, fixed[name]) for name, tensor in model.named_buffers())
    for (name, after), old in zip(own.items(), before, strict=True):
        assert (after - old).abs().max() > 0.001, name


@pytest.mark.parametrize("init", HARMLESS)
def test_the_padding_row_of_an_embedding_is_not_trained(init: str) -> None:
    module = plain("embedding-padding")
    model, part = start(module, rank=3, init=init)
    optimizer = torch.optim.AdamW([part.A, part.B], lr=0.1)
    tokens = torch.arange(module.num_embeddings)
    for _ in range(3):
        optimizer.zero_grad()
        (model(tokens) - 1).square().sum().backward()
        optimizer.step()
    moved = (model(tokens) - module(tokens)).detach().abs().amax(1)
    assert moved[tokens != module.padding_idx].min() > 0.01
    torch.testing.assert_close(moved[module.padding_idx], torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", ["linear", "hf-conv1d", "embedding", "conv2d-depthwise"])
def test_a_rank_above_what_the_layer_can_have_warns(layer: str) -> None:
    module = plain(layer)
    full = min(canonical(module).shape)
    start(module, rank=full)  # warnings are errors here
    with pytest.warns(tg.TorchgraftWarning, match=rf"0: rank {full + 1} is more than min\(out, in\) = {full}"):
        _, part = start(module, rank=full + 1)
    assert len(part.A) == full + 1
    with pytest.raises(tg.ConfigError, match=f"0: pissa.*{full + 1}.*the layer has {full}; lower the rank"):
        start(module, rank=full + 1, init="pissa")


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"rank": 0}, ["lora: rank = 0", "greater than or equal to 1"]),
    ({"rank": -3}, ["rank = -3", "greater than or equal to 1"]),
    ({"rank": "8"}, ["rank = '8'", "integer"]),
    ({"rank": 2.5}, ["rank = 2.5", "integer"]),
    ({"rank": True}, ["rank = True", "integer"]),
    ({"rank": None}, ["rank = None", "integer"]),
    ({"alpha": 0}, ["alpha = 0", "greater than 0"]),
    ({"alpha": -1.0}, ["alpha = -1.0", "greater than 0"]),
    ({"alpha": nan}, ["alpha = nan"]),
    ({"alpha": inf}, ["alpha = inf", "finite"]),
    ({"alpha": "16"}, ["alpha = '16'", "number"]),
    ({"dropout": 1.0}, ["dropout = 1.0", "less than 1"]),
    ({"dropout": -0.1}, ["dropout = -0.1", "greater than or equal to 0"]),
    ({"sigma": 0.0}, ["sigma = 0.0", "greater than 0"]),
    ({"scaling": "alpha/r2"}, ["scaling = 'alpha/r2'", "'alpha/r', 'alpha/sqrt(r)' or 'none'"]),
    ({"init": "kaimng"}, ["init = 'kaimng'", "'kaiming'", "'pissa'", "'swapped'"]),
    ({"dtype": "int8"}, ["dtype = 'int8'", "'bfloat16'"]),
    ({"rnak": 8}, ["lora has no option 'rnak'", "near names: rank", "alpha", "dropout"]),
    ({"lora_alpha": 8}, ["lora has no option 'lora_alpha'", "near names: alpha"]),
    ({"rank": 0, "alpha": 0}, ["rank = 0", "alpha = 0"]),
    ({"overrides": {"head": {"rank": 0}}}, ["rank = 0"]),
    ({"overrides": {"head": {"rnak": 1}}}, ["'rnak'", "near names: rank"]),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: ",".join(value) if isinstance(value, dict) else "")
def test_a_bad_option_is_refused_and_the_model_left_alone(options: dict[str, Any], words: list[str]) -> None:
    model = Plain()
    keys = list(model.state_dict())
    with pytest.raises(tg.ConfigError) as caught:
        tg.apply(model, "lora", targets=["@all"], **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys
    assert not tg.adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_dtype_can_be_torchs_own_and_alpha_whole() -> None:
    _, part = start(nn.Linear(4, 6), rank=2, alpha=3, dtype=torch.bfloat16)
    assert part.A.dtype == part.B.dtype == torch.bfloat16
    assert prod(part.A.shape) == 8
    assert part.config.scale == 1.5
