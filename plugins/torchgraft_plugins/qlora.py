"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): LoRA on a frozen weight that is stored in 4 bits.

    h = dequant(W₄)·x + s·B·A·x

W₄ stores 4 bits per weight, NF4 or FP4, and one scale per block. Double quantization stores the scales in 8 bits: 4.127 bits
per weight in total. W₄ is dequantized to `compute_dtype` for each product; A and B are in 16 or 32 bits (`dtype`).

The selected linear layers are quantized in place and stay quantized after `detach`, because their original weights are gone. To
load a large model without holding all of it in 16 bits, use `tg.load_quantized`. Layers that are already in 4 or 8 bits
are not changed. Everything except quantization is LoRA's, and the other methods work on 4-bit layers too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

import torchgraft as tg
from torchgraft import hookimpl
from torchgraft_plugins.lora import (
    adapter_forward as adapter_forward,
    adapter_init as adapter_init,
    adapter_merge as adapter_merge,
    adapter_param_groups as adapter_param_groups,
    adapter_shapes as adapter_shapes,
    adapter_to_lora as adapter_to_lora,
    adapter_unmerge as adapter_unmerge,
)

if TYPE_CHECKING:
    from torch import nn


class QloraConfig(tg.LowRankConfig):
    quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="the 16 values that a weight can have: quantiles of a normal distribution, or 4-bit floats"
    )
    double_quant: bool = Field(True, description="quantize the scales of the blocks to 8 bits")
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="number of weights that share a scale")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="dtype to which weights are dequantized in forward"
    )

    def weight_bits(self) -> float:
        return self.quantization.bits

    @property
    def quantization(self) -> tg.Quantization:
        return tg.Quantization(self.quant_type, self.double_quant, self.block_size, self.compute_dtype)


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method(
        name="qlora",
        config=QloraConfig,
        summary="LoRA on a frozen weight that is stored in 4 bits",
        reference="https://arxiv.org/abs/2305.14314",
        kinds=frozenset({"Linear", "Linear4bit", "Linear8bitLt"}),
        buffers=frozenset({"A0", "B0"}),
        roles={"A": "A", "B": "B"},
        additive=True,
        peft=tg.LowRankPeft(claims=False),
    )


@hookimpl
def adapter_prepare(site: tg.Site, config: QloraConfig) -> nn.Module | None:
    if site.kind.quantized or site.module is None:
        return None
    return tg.quantized_linear(site.module, config.quantization, site.name)
