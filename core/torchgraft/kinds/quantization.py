"""Settings of 4-bit weights. This module imports no torch, because estimates of memory use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchgraft.errors import ConfigError

BITS_OF_SCALES = {True: 8 + 32 / 256, False: 32}
"""Bits for each block's scale. With double quantization (True): 8, and a float32 for each 256 scales."""

ALLOWED: dict[str, tuple[object, ...]] = {
    "type": ("nf4", "fp4"),
    "double": (True, False),
    "block_size": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "compute_dtype": ("bfloat16", "float16", "float32"),
}


@dataclass(frozen=True)
class Quantization:
    """The settings of a 4-bit weight (Dettmers et al. 2023, arXiv 2305.14314).

    Each block of `block_size` entries, in row-major order, is divided by its largest magnitude and rounded to the 16
    values of `type`; with `double` the blocks' scales are quantized in turn, to 8 bits.
    """

    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    block_size: int = 64
    compute_dtype: str = "bfloat16"
    """Dtype to which weights are dequantized in a forward."""

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"quantization: {name} = {getattr(self, name)!r}; it can be {', '.join(map(str, allowed))}")

    @staticmethod
    def recorded(how: Mapping[str, Any]) -> tuple[Quantization, str]:
        """Return the settings that an adapter's record contains for one layer, and the dtype that was quantized.

        Raises:
            ConfigError: the dtype or a setting is not supported.
        """
        if how.get("from") not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"quantization: unknown source dtype {how.get('from')!r}; expected float32, bfloat16 or float16")
        settings: dict[str, Any] = {name: how.get(name) for name in ("type", "double", "block_size")}
        return Quantization(**settings, compute_dtype=how.get("compute_dtype", "float32")), str(how["from"])

    @property
    def bits(self) -> float:
        """Bits for each entry of the weight: 4.127 with double quantization and blocks of 64."""
        return 4 + BITS_OF_SCALES[self.double] / self.block_size
