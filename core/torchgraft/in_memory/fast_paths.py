"""torch's fused encoder layers read the weights of their children in eval, and would pass over adapters in silence."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from torchgraft.errors import AttachError


def modules_in_fused_layers(model: nn.Module) -> set[nn.Module]:
    """Modules in an nn.TransformerEncoderLayer. One of them with a hook on it keeps the layer from its fused path."""
    layers = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    return {child for layer in layers for child in layer.modules()}


def check_forward_runs(name: str, module: nn.Module, in_attention: Container[nn.Module]) -> None:
    """
    Args:
        in_attention: the result of `layers.of_module.modules_in_attention`.

    Raises:
        AttachError: nothing calls the module's own forward, so what is put on it would be passed over.
    """
    if "forward" in module.__dict__:
        raise AttachError(f"{name}: its forward was replaced on the instance (by accelerate's hooks?), which would pass over the adapter")
    if module in in_attention:
        raise AttachError(
            f"{name}: it belongs to a MultiheadAttention, which reads its weight and passes over its forward; train that whole"
        )


def stop_nesting(model: nn.Module) -> list[nn.TransformerEncoder]:
    """Keep encoders from nested tensors, which only the fused path takes. Returns those that used them."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    return encoders
