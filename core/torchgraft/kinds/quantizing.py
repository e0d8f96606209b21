"""Conversion of linear layers to 4-bit layers of bitsandbytes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import dtypes
from torchgraft.checkpoint import fingerprint
from torchgraft.errors import AttachError
from torchgraft.kinds.quantization import Quantization


def quantized_linear(linear: nn.Module, how: Quantization, name: str = "") -> nn.Linear:
    """Return a bitsandbytes.nn.Linear4bit with the quantized weight of `linear` and its bias. `linear` does not change.

    Args:
        name: the layer's name, for error messages.

    Raises:
        AttachError: the weight has no values, or a type that cannot be quantized.
    """
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]
    if weight.is_meta:
        raise AttachError(
            f"{name}: its weight is on the meta device and has no values to quantize; use tg.load_quantized on the checkpoint"
        )
    if weight.dtype == torch.float64:
        raise AttachError(f"{name}: bitsandbytes does not quantize float64; convert the model to float32 or bfloat16 first")
    out_features, in_features = weight.shape
    layer = blank_linear(in_features, out_features, linear.bias is not None, how)
    set_weight(layer, weight, how)
    layer.bias = linear.bias  # type: ignore[assignment]
    return layer


def blank_linear(in_features: int, out_features: int, bias: bool, how: Quantization) -> nn.Linear:
    """Return a bitsandbytes.nn.Linear4bit on the meta device."""
    from bitsandbytes import nn as bnb

    with torch.device("meta"):
        layer: Any = bnb.Linear4bit(  # type: ignore[attr-defined, no-untyped-call]
            in_features, out_features, bias, dtypes.torch_dtype(how.compute_dtype), how.double, how.type
        )
    # In eval on CPUs with AVX512-BF16, bitsandbytes would repack the weight and round its scales permanently.
    layer.support_avx512bf16_for_cpu = False
    layer.requires_grad_(False)
    return cast(nn.Linear, layer)


def set_weight(layer: Any, weight: Tensor, how: Quantization) -> None:
    """Quantize `weight` into `layer`, on the device of `weight`."""
    from bitsandbytes import nn as bnb

    parameter: Any = bnb.Params4bit(  # type: ignore[attr-defined]
        weight.contiguous(), requires_grad=False, blocksize=how.block_size, compress_statistics=how.double, quant_type=how.type
    )
    layer.weight = parameter.to(weight.device)
    layer.quant_state = layer.weight.quant_state
    layer.__dict__[fingerprint.SOURCE] = fingerprint.of_tensor(weight)


class Dequantized(nn.Linear):
    """A linear layer that takes inputs of any floating type and returns outputs in that type, as the quantized layers do."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]  # as in nn.Linear itself

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)
