"""Warn where the weights differ from those that an adapter was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torchgraft.errors import TorchgraftWarning
from torchgraft.method.site import Site
from torchgraft.pairing.pairing import Pairing


def warn_of_other_weights(pairing: Pairing, sites: Iterable[Site], *, requantized: bool = False, over_others: bool = False) -> None:
    """Warn if an adapter was trained on quantized weights or over earlier adapters, and the weights here differ.

    Args:
        requantized: the weights are quantized again as they were.
        over_others: earlier adapters are merged before it.
    """
    recorded = {pairing.renamed.get(name, name): site for name, site in pairing.files.recorded_sites.items()}
    quantized, alone = [], []
    for site in sites:
        record = recorded.get(site.name)
        if record is None:
            continue
        if not requantized and record.quantization and _codes(record.quantization) != _codes(site.quantization):
            quantized.append(site)
        if record.beneath and not over_others and not (site.beneath and site.beneath.names()):
            alone.append(site)
    if quantized:
        was, now = recorded[quantized[0].name].quantization, quantized[0].quantization or quantized[0].dtype
        _warn(
            quantized,
            f"it was trained on quantized weights, {was}, and here they are {now}: its effect will not be quite the same",
        )
    if alone:
        names = ", ".join(recorded[alone[0].name].beneath)
        _warn(alone, f"it was trained over {names}, and depends on that: it must be in the weights or on the layer before")


def _codes(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that determine the stored codes. compute_dtype is ignored: bitsandbytes may set it in the first forward."""
    return {key: value for key, value in quantization.items() if key != "compute_dtype"}


def _warn(sites: list[Site], text: str) -> None:
    more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    warnings.warn(f"{sites[0].name}{more}: {text}", TorchgraftWarning, stacklevel=4)
