"""Find the quantized layers of a checkpoint, and the tensors that may take another dtype.

A quantized layer is stored as packed codes and the scales and tables that decode them: `weight` with `weight_scale`, `qweight`
with `scales` and `qzeros`, `weight` with `weight.absmax` and `weight.quant_map`. Its tensors have a meaning only together.
"""

from __future__ import annotations

from collections.abc import Iterable

from torchgraft.checkpoint.header import TensorEntry
from torchgraft.dtypes import ADAPTABLE

UNPACKED = ADAPTABLE | {"int64", "uint64", "bool", "complex64"}
"""Dtypes of weights, indices, masks and counters. Other dtypes contain packed codes."""
PARAMETERS = ("weight", "bias")


def owner(tensor: str) -> str:
    """Return the layer that a tensor belongs to: "a.weight", "a.weight.absmax" and "a.qweight" belong to "a"."""
    return tensor.partition(".weight.")[0] if ".weight." in tensor else tensor.rpartition(".")[0]


def packed_layers(tensors: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    """Return quantized layer → one of its tensors of packed codes."""
    return {owner(entry.name): entry for entry in tensors if entry.dtype not in UNPACKED}


def convertible(tensors: Iterable[TensorEntry]) -> frozenset[str]:
    """Return the tensors whose dtype may change: floating ones; beside quantized layers, only weights and biases of other layers.

    Scales that no rule finds, such as those of a quantized key-value cache, thus keep their dtype.
    """
    entries = list(tensors)
    packed = packed_layers(entries)
    floats = (entry.name for entry in entries if entry.dtype in ADAPTABLE)
    return frozenset(name for name in floats if not packed or (owner(name) not in packed and name.rpartition(".")[2] in PARAMETERS))
