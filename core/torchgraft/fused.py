"""torch's fused encoder layers read the weights of their children in eval, and would pass over adapters in silence."""

from __future__ import annotations

from torch import nn


def modules_in_fused_layers(model: nn.Module) -> set[nn.Module]:
    """Modules in an nn.TransformerEncoderLayer. One of them with a hook on it keeps the layer from its fused path."""
    layers = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    return {child for layer in layers for child in layer.modules()}


def stop_nesting(model: nn.Module) -> list[nn.TransformerEncoder]:
    """Keep encoders from nested tensors, which only the fused path takes. Returns those that used them."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    return encoders
