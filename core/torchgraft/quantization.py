"""How a weight is stored in 4 bits. Without torch, for it serves estimates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchgraft.errors import ConfigError

BITS_OF_SCALES = {True: 8 + 32 / 256, False: 32}
"""Bits for each block's scale: with double quantisation 8, and a float32 for each 256 of them."""

ALLOWED = {
    "type": ("nf4", "fp4"),
    "block_size": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "compute_dtype": ("bfloat16", "float16", "float32"),
}


@dataclass(frozen=True)
class Quantization:
    """How a weight is stored in 4 bits (Dettmers et al. 2023, arXiv 2305.14314).

    Each block of `block_size` entries, in row-major order, is divided by its largest magnitude and rounded to the 16
    values of `type`; with `double` the blocks' scales are quantised in turn, to 8 bits.
    """

    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    block_size: int = 64
    compute_dtype: str = "bfloat16"
    """What weights are dequantised to in forward."""

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"quantization: {name} = {getattr(self, name)!r}; it can be {', '.join(map(str, allowed))}")

    @property
    def bits(self) -> float:
        """For each weight: 4.127 with double quantisation and blocks of 64."""
        return 4 + BITS_OF_SCALES[self.double] / self.block_size
