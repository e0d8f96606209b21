"""Handling of torch's fused encoder layers, which read the weights of their children in eval and would silently bypass adapters."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from torchgraft.errors import AttachError


def modules_in_fused_layers(model: nn.Module) -> set[nn.Module]:
    """Return all submodules of nn.TransformerEncoderLayers. A forward hook on any of them disables that layer's fused path."""
    layers = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    return {child for layer in layers for child in layer.modules()}


def check_forward_runs(name: str, module: nn.Module, in_attention: Container[nn.Module]) -> None:
    """Check that the module's forward is called, so that an adapter on it takes effect.

    Args:
        in_attention: the result of `layers.of_module.modules_in_attention`.

    Raises:
        AttachError: nothing calls the forward of the module's class, so an adapter would be bypassed.
    """
    if "forward" in module.__dict__:
        raise AttachError(f"{name}: its forward was replaced on the instance (by accelerate's hooks?), which would bypass the adapter")
    if module in in_attention:
        raise AttachError(
            f"{name}: it belongs to a MultiheadAttention, which reads its weight and bypasses its forward; train the attention module fully"
        )


def stop_nesting(model: nn.Module) -> list[nn.TransformerEncoder]:
    """Disable nested tensors in encoders, because only the fused path accepts them. Return the encoders that used them."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    return encoders
