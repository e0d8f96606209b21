"""Every method on the quantised layers of bitsandbytes, against weights that are decoded here, nibble by nibble, in float64."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor, nn

import torchgraft as tg
from models import perturb_

RANK, ALPHA = 4, 6.0
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "loraplus": {},
    "qlora": {},
    "dora": {},
    "adalora": {},
    "adalora, budget": {"allocator": "budget", "total_steps": 100},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The paper's appendix E, and the 4-bit floats of bitsandbytes (a sign, two bits of exponent, one of mantissa), over their largest.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
TABLES = {"nf4": torch.tensor(NF4).double(), "fp4": torch.tensor([*FP4, *(-value for value in FP4)]).double()}

repacks = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks only on CPUs with AVX512-BF16")


def four_bit(
    shape: tuple[int, int] = (64, 128),
    dtype: str = "float32",
    compute: str | None = "float32",
    bias: bool = True,
    storage: torch.dtype = torch.uint8,
    **how: Any,
) -> nn.Module:
    """A layer (out, in) as bitsandbytes itself makes it."""
    out, width = shape
    how = {"quant_type": "nf4", "compress_statistics": True, "blocksize": 64, "quant_storage": storage, **how}
    layer = bnb.nn.Linear4bit(width, out, bias, compute_dtype=DTYPES.get(compute or ""), quant_storage=storage)
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(2)).to(DTYPES[dtype])
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **how)
    return layer.to("cpu")


def eight_bit(shape: tuple[int, int] = (64, 128), bias: bool = True) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias, has_fp16_weights=False)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nf4": four_bit,
    "fp4, one scale for each block": lambda: four_bit(quant_type="fp4", compress_statistics=False),
    "no bias, square": lambda: four_bit((64, 64), bias=False),
    "8 bit": eight_bit,
}
ODD = {"10 to 6": lambda: four_bit((6, 10)), "5 to 3": lambda: four_bit((3, 5)), "8 bit, 10 to 6": lambda: eight_bit((6, 10))}


def decoded(layer: nn.Module) -> Tensor:
    """The weight (out, in) that the codes and scales of a layer stand for, in float64."""
    shape = (layer.out_features, layer.in_features)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return layer.weight.data.double() * (scales_of(layer)[0].double() / 127)[:, None]
    state = layer.weight.quant_state
    packed = layer.weight.data.contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: shape[0] * shape[1]].long()
    scales = state.absmax
    if state.nested:
        outer = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: len(scales)]
        scales = state.state2.code.double()[scales.long()] * outer + state.offset.double()
    return (TABLES[state.quant_type][codes] * scales.double().repeat_interleave(state.blocksize)[: len(codes)]).reshape(shape)


def scales_of(layer: nn.Module) -> list[Tensor]:
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return [layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB]
    state = layer.weight.quant_state
    return [state.absmax, *([state.offset, state.state2.absmax, state.state2.code] if state.nested else [])]


def stored(layer: nn.Module) -> list[Any]:
    """Class, codes and scales: what must come back."""
    return [type(layer), layer.weight.data.clone(), *(scale.clone() for scale in scales_of(layer))]


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        if isinstance(first, Tensor):
            assert first.dtype == second.dtype
            one_bytes, other_bytes = (tensor.reshape(-1).view(torch.uint8) for tensor in (first, second))
            assert one_bytes.equal(other_bytes)  # for codes under another type can look like NaN
        else:
            assert first is second


def adapted(layer: nn.Module, method: str = "lora", perturb: bool = True) -> tuple[nn.Sequential, tg.Adapter]:
    model = nn.Sequential(layer)
    adapter = tg.apply(model, method.partition(",")[0], ["0"], rank=RANK if layer.out_features > 4 else 2, alpha=ALPHA, **METHODS[method])
    if perturb:
        perturb_(adapter.parameters(), 0.2)
    return model, adapter


def effective(adapter: tg.Adapter, weight: Tensor) -> Tensor:
    """W + s·B·A, W + s·B·Λ·A, or m·V/‖V‖ with V = W + s·B·A."""
    params = {name: tensor.detach().double() for name, tensor in adapter.parts["0"].tensors().items()}
    a, b = params["A"], params["B"]
    v = weight.double() + ALPHA / len(a) * b @ (params.get("E", torch.ones(len(a), 1).double()) * a)
    return params["m"][:, None] * v / v.norm(dim=1, keepdim=True) if "m" in params else v


def inputs(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(4)).to(dtype)


def dense(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    y = x.double() @ weight.double().T
    return y if layer.bias is None else y + layer.bias.detach().double()


def layer_alone(layer: nn.Module, x: Tensor, autocast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found: Tensor = bnb.nn.Linear4bit.forward(layer, x)
    return found


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("shape", [(64, 256), (6, 10), (3, 5)], ids=str)
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_method_sees_the_weight_that_the_layer_computes_with(
    dtype: str, quant_type: str, double: bool, blocksize: int, shape: tuple[int, int]
) -> None:
    layer = four_bit(shape, dtype, quant_type=quant_type, compress_statistics=double, blocksize=blocksize)
    _, adapter = adapted(layer, perturb=False)
    (site,) = adapter.sites
    how = {"type": quant_type, "block_size": blocksize, "double": double}
    assert site.quantization.items() >= how.items()
    assert (site.kind.name, site.shape, site.dtype, site.weight().dtype) == ("Linear4bit", shape, dtype, torch.float32)
    computed = layer.train()(torch.eye(shape[1])).T - layer.bias[:, None]
    assert error(computed, decoded(layer)) < 1e-6
    assert error(site.weight(), decoded(layer)) < 1e-6


def test_a_method_sees_the_weight_of_an_8_bit_layer() -> None:
    layer = eight_bit()
    _, adapter = adapted(layer, perturb=False)
    assert error(adapter.sites[0].weight(), decoded(layer)) < 1e-6
    layer.train()(inputs(layer))  # moves the scales from the weight to the layer's state
    assert layer.weight.SCB is None
    assert error(adapter.sites[0].weight(), decoded(layer)) < 1e-6


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_that_are_stored_as_floats_are_still_codes(storage: torch.dtype) -> None:
    """quant_storage, which FSDP needs: the bytes of the codes under another type."""
    layer = four_bit(storage=storage)
    before, weight = stored(layer), decoded(layer)
    model, adapter = adapted(layer.train())
    assert error(adapter.sites[0].weight(), weight) < 1e-6
    unmerged = model(inputs(layer))
    adapter.merge()
    assert error(model(inputs(layer)), unmerged) < 1e-5
    adapter.detach()
    assert_same(stored(layer), before)


@pytest.mark.parametrize("layer", (LAYERS | ODD).values(), ids=LAYERS | ODD)
@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_the_model_as_it_was(method: str, layer: Callable[[], nn.Module]) -> None:
    module = layer().train()
    before = module(inputs(module))
    model, _ = adapted(module, method, perturb=False)
    torch.testing.assert_close(model(inputs(module)), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", (LAYERS | ODD).values(), ids=LAYERS | ODD)
@pytest.mark.parametrize("method", METHODS)
def test_forward_merge_and_unmerge(method: str, layer: Callable[[], nn.Module]) -> None:
    module = layer().train()
    cls, before, weight = type(module), stored(module), decoded(module)
    model, adapter = adapted(module, method)
    want, x = effective(adapter, weight), inputs(module)
    assert isinstance(module, cls)
    assert error(model(x), dense(module, want, x)) < 1e-5
    assert error(model(x), dense(module, weight, x)) > 0.005
    unmerged = model(x)
    with adapter.disabled():
        assert error(model(x), dense(module, weight, x)) < 1e-5
    for _ in range(2):
        adapter.merge()
        assert model[0] is module
        assert error(module.weight, want) < 1e-5
        assert error(model(x), unmerged) < 1e-5
        adapter.unmerge()
        assert isinstance(module, cls)
        assert model(x).equal(unmerged)
    adapter.detach()
    assert_same(stored(module), before)
    assert error(module(x), dense(module, weight, x)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16(method: str) -> None:
    layer = four_bit(dtype="bfloat16", compute="bfloat16").train()
    weight, before = decoded(layer), stored(layer)
    model, adapter = adapted(layer, method)
    x = inputs(layer, torch.bfloat16)
    want = dense(layer, effective(adapter, weight), x)
    assert model(x).dtype == torch.bfloat16
    assert error(model(x), want) < 0.01
    adapter.merge()
    assert error(model(x), want) < 0.01
    assert model(x).dtype == torch.bfloat16
    adapter.detach()
    assert_same(stored(layer), before)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_gradients_are_those_of_the_dense_weight(layer: Callable[[], nn.Module]) -> None:
    module = layer().train()
    weight = decoded(module)
    model, adapter = adapted(module)
    x = inputs(module).requires_grad_()
    model(x).square().sum().backward()
    a, b = (adapter.parts["0"].tensors()[name].detach().double().requires_grad_() for name in "AB")
    wide = x.detach().double().requires_grad_()
    dense(module, weight + ALPHA / RANK * b @ a, wide).square().sum().backward()
    for got, want in ((adapter.parts["0"].A.grad, a.grad), (adapter.parts["0"].B.grad, b.grad), (x.grad, wide.grad)):
        assert error(got, want) < 1e-5
    assert module.weight.grad is None


@pytest.mark.parametrize("how", [{}, {"bias": False}, {"quant_type": "fp4", "compress_statistics": False}], ids=["nf4", "no bias", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dequantised_weight_at_hand_gives_what_the_layer_gives(dtype: str, how: dict[str, Any]) -> None:
    """To the last bit: output, and the gradients of input and bias."""
    layer = four_bit(dtype=dtype, compute=dtype, **how).train()
    kind = tg.apply(nn.Sequential(layer), "lora", ["0"], rank=RANK).sites[0].kind
    base = bnb.nn.Linear4bit.forward.__get__(layer)
    results = []
    for product in (base, lambda x: kind.product_with(layer, x, kind.weight_for_product(layer, x, base))):
        x = inputs(layer, DTYPES[dtype]).flatten(0, -2).requires_grad_()
        wanted = [x] if layer.bias is None else [x, layer.bias.requires_grad_()]
        y = product(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    assert_same(*results)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("compute", [*DTYPES, None])
@pytest.mark.parametrize("stored", DTYPES)
def test_dora_in_training_in_types_that_differ(stored: str, compute: str | None, own: str, autocast: bool) -> None:
    layer = four_bit(dtype=stored, compute=compute).train()
    weight = decoded(layer)
    model, adapter = adapted(layer, "dora")
    x = inputs(layer, DTYPES[own]).requires_grad_()
    kind, taken = adapter.sites[0].kind, []
    product = type(kind).product_with
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        patch.setattr(type(kind), "product_with", lambda *given, **named: taken.append(1) or product(*given, **named))
        y = model(x)
    assert y.dtype == layer_alone(layer, x, autocast).dtype
    assert bool(taken) == (compute == own and not autocast and DTYPES[own] == torch.promote_types(DTYPES[stored], DTYPES[own]))
    y.double().square().sum().backward()
    wide = x.detach().double().requires_grad_()
    want = dense(layer, effective(adapter, weight), wide)
    want.square().sum().backward()
    narrow = {stored, compute, own} != {"float32"} or autocast
    assert error(y, want) < (0.02 if narrow else 1e-5)
    assert error(x.grad, wide.grad) < (0.02 if narrow else 1e-5)


def test_a_weight_is_dequantised_for_the_product_only_where_that_is_taken() -> None:
    layer = four_bit().train()
    model, adapter = adapted(layer, "dora")
    site, x = adapter.sites[0], inputs(layer)
    forward = bnb.nn.Linear4bit.forward.__get__(layer)
    assert torch.equal(site.weight_for_product(x, forward), site.stored_weight())
    assert site.weight_for_product(x.half(), forward) is None
    assert site.weight_for_product(x.transpose(0, 1), forward) is None
    assert site.weight_for_product(x, lambda x: forward(x)) is None, "another adapter lies beneath"
    with torch.autocast("cpu", torch.bfloat16):
        assert site.weight_for_product(x, forward) is None
    assert adapted(eight_bit().train())[1].sites[0].weight_for_product(x, forward) is None
    model.eval()
    assert site.weight_for_product(x, forward) is None, "the norm is kept"


def test_dora_dequantises_once_for_norm_and_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = four_bit().train()
    model, adapter = adapted(layer, "dora")
    x, weight = inputs(layer).requires_grad_(), decoded(layer)
    model(x)  # ‖W₀‖² is kept from here on
    calls = []
    original = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *given, **named: calls.append(1) or original(*given, **named))
    monkeypatch.setattr(torch.ops.bitsandbytes, "gemm_4bit", None)  # it dequantises out of sight
    y = model(x)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2, "the weight is not to be kept for backward"
    assert error(y, dense(layer, effective(adapter, weight), x)) < 1e-5


@repacks
@pytest.mark.parametrize("moment", ["before the adapter", "with the adapter"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_after_bitsandbytes_has_repacked_the_weight(method: str, quant_type: str, double: bool, moment: str) -> None:
    """In eval the layer computes in bfloat16, with scales that are rounded to it for good."""
    layer = four_bit(quant_type=quant_type, compress_statistics=double).eval()
    weight, codes, x = decoded(layer), layer.weight.data.clone(), inputs(layer)
    if moment == "before the adapter":
        layer(x)
    model, adapter = adapted(layer, method)
    model(x)
    got = model(x)
    if moment == "before the adapter":
        assert layer.weight.quant_state.packing_format_for_cpu
        assert not layer.weight.data.reshape(-1).equal(codes.reshape(-1)), "the codes must have moved"
    assert error(got, dense(layer, effective(adapter, weight), x)) < 0.01

    seen = adapter.sites[0].weight()
    with adapter.disabled():
        computed = model(torch.eye(layer.in_features)).T - layer.bias[:, None]
    torch.testing.assert_close(computed, seen, rtol=2**-7, atol=2**-7)  # a product with 1, and a sum with the bias, in bfloat16
    torch.testing.assert_close(seen.double(), weight, rtol=2**-8, atol=1e-7)  # each scale is off by half of bfloat16's step
    before = stored(layer)
    adapter.merge()
    assert error(layer.weight, effective(adapter, seen)) < 1e-6
    assert error(model(x), got) < 0.01
    adapter.unmerge()
    assert model(x).equal(got)
    adapter.detach()
    assert_same(stored(layer)[1:], before[1:])
    assert type(layer) is bnb.nn.Linear4bit


@repacks
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@torch.no_grad()
def test_loading_an_adapter_leaves_a_repacked_weight_alone(double: bool, tmp_path: Path) -> None:
    """bitsandbytes' own way back, which its state_dict takes, leaves single scales transposed."""
    model, adapter = adapted(four_bit(compress_statistics=double))
    adapter.save(tmp_path)
    adapter.detach()
    x = inputs(model.eval()[0])
    want = model(x)
    assert model[0].weight.quant_state.packing_format_for_cpu
    before = stored(model[0])
    loaded = tg.load(model, tmp_path)
    assert_same(stored(model[0])[1:], before[1:])
    unmerged = model(x)
    loaded.merge()
    assert error(model(x), unmerged) < 0.01
    loaded.detach()
    assert_same(stored(model[0]), before)
    assert model(x).equal(want)


@repacks
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_eval_forward_that_repacks_computes_what_the_next_ones_do(method: str) -> None:
    model, _ = adapted(four_bit().eval(), method)
    first = model(inputs(model[0]))
    assert model(inputs(model[0])).equal(first)


@repacks
@pytest.mark.parametrize("targets", [["0"], ["0", "1"]], ids=["an adapter before it", "and on it"])
def test_training_goes_on_rightly_after_an_eval_forward(targets: list[str]) -> None:
    model, x = nn.Sequential(nn.Linear(32, 128), four_bit(bias=False)), torch.randn(3, 32)
    weight = decoded(model[1])
    adapter = tg.apply(model, "lora", targets, rank=RANK, alpha=ALPHA)
    perturb_(adapter.parts["0"].parameters())
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).sum().backward()
    a, b = (adapter.parts["0"].tensors()[name].detach().double().requires_grad_() for name in "AB")
    (dense(model[0], model[0].weight.detach() + ALPHA / RANK * b @ a, x) @ weight.T).sum().backward()
    assert error(adapter.parts["0"].A.grad, a.grad) < 0.02
    assert error(adapter.parts["0"].B.grad, b.grad) < 0.02


@pytest.mark.parametrize("out", [64, 6])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@torch.no_grad()
def test_layers_that_we_quantise_are_never_repacked(double: bool, out: int) -> None:
    model = nn.Sequential(nn.Linear(128, out)).eval()
    adapter = tg.apply(model, "qlora", ["0"], rank=2, double_quant=double, compute_dtype="float32")
    before, weight, x = stored(model[0]), decoded(model[0]), inputs(model[0])
    for module in (model, deepcopy(model)):
        assert error(module(x), dense(module[0], weight, x)) < 1e-6
        assert_same(stored(module[0]), before)
    adapter.detach()
    assert error(model(x), dense(model[0], weight, x)) < 1e-6
    assert_same(stored(model[0])[1:], before[1:])


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_an_8_bit_layer_in_eval_rounds_its_inputs_alone(method: str) -> None:
    """There LLM.int8() has 8 bits for each input, too; merged, they are not rounded."""
    layer = eight_bit().eval()
    weight, before = decoded(layer), stored(layer)
    model, adapter = adapted(layer, method)
    want = dense(layer, effective(adapter, weight), inputs(layer))
    assert error(model(inputs(layer)), want) < 0.02
    adapter.merge()
    assert error(model(inputs(layer)), want) < 1e-5
    adapter.detach()
    assert error(model(inputs(layer)), dense(layer, weight, inputs(layer))) < 0.02
    assert_same(stored(layer), before)


NOT_YET = {
    "4 bit": (lambda: bnb.nn.Linear4bit(64, 64), r"0 is not quantized yet.*\.to\("),
    "8 bit": (lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), r"0 is not quantized yet.*\.to\("),
    "8 bit, trained": (lambda: bnb.nn.Linear8bitLt(64, 64), r"0 quantizes in each forward .*has_fp16_weights=True"),
}


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
@pytest.mark.parametrize(("layer", "reason"), NOT_YET.values(), ids=NOT_YET)
def test_a_layer_that_is_not_quantised_yet_is_refused(layer: Callable[[], nn.Module], reason: str, method: str) -> None:
    model = nn.Sequential(layer())
    with pytest.raises(tg.SelectionError, match=reason):
        tg.apply(model, method, ["0"])
    assert tg.adapters(model) == {}


@pytest.mark.parametrize("layer", [four_bit, eight_bit])
def test_a_quantised_layer_cannot_be_trained_whole(layer: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(layer(), nn.Linear(64, 4))
    with pytest.raises(tg.TorchgraftError, match=r"^0: "):
        tg.apply(model, "lora", ["1"], rank=2, also_train=["0"])
    assert tg.adapters(model) == {}
    assert type(model[0]) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def by_copy(model: nn.Module) -> nn.Module:
    return deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
@pytest.mark.parametrize("again", [by_copy, by_pickle])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("method", ["lora", "dora", "adalora, budget"])
def test_a_copy_is_whole_and_its_own(method: str, layer: Callable[[], nn.Module], again: Callable[..., Any], merged: bool) -> None:
    model, adapter = adapted(layer().train(), method)
    x, cls = inputs(model[0]), type(model[0])
    before, unmerged = stored(model[0]), model(x)
    if merged:
        adapter.merge()
    want = model(x)
    copy = again(model)
    assert copy(x).equal(want)
    own = tg.adapters(copy)["default"]
    if merged:
        own.unmerge()
    assert isinstance(copy[0], cls)
    assert copy(x).equal(unmerged)
    perturb_(own.parameters())
    own.merge()
    assert model(x).equal(want)
    own.detach()
    assert_same(stored(copy[0])[1:], before[1:])
    assert type(copy[0]) is cls.__mro__[2]
    assert model(x).equal(want)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_base_s_part_of_state_dict_is_as_it_was(layer: Callable[[], nn.Module]) -> None:
    module = layer().train()
    before = {key: tensor.clone() for key, tensor in nn.Sequential(module).state_dict().items()}
    model, adapter = adapted(module)
    assert {key for key in model.state_dict() if key not in before} == {"0.adapters.default.A", "0.adapters.default.B"}
    for _ in range(2):
        assert all(model.state_dict()[key].equal(tensor) for key, tensor in before.items())
        adapter.merge()
        adapter.unmerge()
    adapter.detach()
    assert list(model.state_dict()) == list(before)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if name.endswith("weight"))


def test_a_plan_counts_weights_and_not_bytes() -> None:
    model = nn.ModuleDict(
        {"self_attn": nn.ModuleDict({"q_proj": four_bit((64, 256))}), "down": eight_bit((6, 10)), "odd": four_bit((3, 5))}
    )
    plan = tg.plan(model)
    found = {layer.name: (layer.kind, layer.shape, layer.params, layer.role) for layer in plan.sites}
    assert found == {
        "self_attn.q_proj": ("Linear4bit", (64, 256), 64 * 256 + 64, "attention"),
        "down": ("Linear8bitLt", (6, 10), 6 * 10 + 6, "linear"),
        "odd": ("Linear4bit", (3, 5), 3 * 5 + 3, "linear"),
    }
    assert {layer.name: layer.bytes for layer in plan.sites} == {
        "self_attn.q_proj": 64 * 256 // 2 + 4 * 64,
        "down": 60 + 4 * 6,
        "odd": 8 + 4 * 3,
    }
    assert [layer.name for layer in tg.plan(model, "@attention").sites] == ["self_attn.q_proj"]
