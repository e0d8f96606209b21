"""Quantized layers of bitsandbytes, and their weights decoded nibble by nibble in float64."""

from __future__ import annotations

from collections.abc import Callable
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
    state: Any = layer.weight.quant_state
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
