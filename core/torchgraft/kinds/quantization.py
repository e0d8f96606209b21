"""How a weight is stored in 4 bits. Without torch, for it serves estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchgraft.errors import ConfigError

BITS_OF_SCALES = {True: 8 + 32 / 256, False: 32}
"""Bits for each block's scale: with double quantisation 8, and a float32 for each 256 of them."""

ALLOWED: dict[str, tuple[object, ...]] = {
    "type": ("nf4", "fp4"),
    "double": (True, False),
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

    @staticmethod
    def recorded(how: Mapping[str, Any]) -> tuple[Quantization, str]:
        """What an adapter's record says of one layer, and the dtype that was quantised.

        Raises:
            ConfigError: it is not known here.
        """
        if how.get("from") not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"quantization: it is not known of what type the weight was: {how.get('from')!r}")
        settings: dict[str, Any] = {name: how.get(name) for name in ("type", "double", "block_size")}
        return Quantization(**settings, compute_dtype=how.get("compute_dtype", "float32")), str(how["from"])

    @property
    def bits(self) -> float:
        """For each weight: 4.127 with double quantisation and blocks of 64."""
        return 4 + BITS_OF_SCALES[self.double] / self.block_size
