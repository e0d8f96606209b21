"""4-bit weights as bitsandbytes' own functions build and read them."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

TOKENS = torch.arange(8).reshape(2, 4)
EXACT = {"compute_dtype": "float32"}
WAYS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "one scale for each block": {"double_quant": False},
    "blocks of 256": {"block_size": 256},
}


def by_hand(weight: Tensor, quant_type: str = "nf4", double_quant: bool = True, block_size: int = 64) -> list[Tensor]:
    """Return the codes and scales that bitsandbytes' own function computes, and the dequantized weight."""
    packed, state = bnb.functional.quantize_4bit(
        weight.detach().clone(), blocksize=block_size, compress_statistics=double_quant, quant_type=quant_type
    )
    return [packed, *scales(state), bnb.functional.dequantize_4bit(packed, state)]


def scales(state: Any) -> list[Tensor]:
    return [state.absmax, *([state.offset, state.state2.absmax] if state.nested else [])]


def contents(layer: nn.Module) -> list[Tensor]:
    """Return the codes, the scales and the dequantized weight of a 4-bit layer, in the order of `by_hand`."""
    weight: Any = layer.weight
    return [weight.data, *scales(weight.quant_state), bnb.functional.dequantize_4bit(weight.data, weight.quant_state)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a.dtype == b.dtype and a.equal(b) for a, b in zip(one, other, strict=True))


def error(got: Tensor, want: Tensor) -> float:
    """Return ‖got - want‖/‖want‖ in float64."""
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits
