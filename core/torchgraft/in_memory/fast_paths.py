"""Handling of torch's fused encoder layers, which read the weights of their children in eval and would silently bypass adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from torchgraft.errors import AttachError
from torchgraft.kinds.kind import bound_forwards


def modules_in_fused_layers(model: nn.Module) -> set[nn.Module]:
    """Return all submodules of nn.TransformerEncoderLayers. A forward hook on any of them disables that layer's fused path."""
    layers = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    return {child for layer in layers for child in layer.modules()}


def check_forward_runs(name: str, module: nn.Module, bypassed: Mapping[nn.Module, str]) -> None:
    """Check that the module's forward is called, so that an adapter on it takes effect.

    Args:
        bypassed: the result of `bypassed_modules`.

    Raises:
        AttachError: nothing calls the forward of the module's class, so an adapter would be bypassed.
    """
    if "forward" in module.__dict__ and not bound_forwards(module):
        raise AttachError(f"{name}: its forward was replaced on the instance, which would bypass the adapter")
    if module in bypassed:
        raise AttachError(f"{name}: it {bypassed[module]}; train the module that contains it fully")


def stop_nesting(model: nn.Module) -> list[nn.TransformerEncoder]:
    """Disable nested tensors in encoders, because only the fused path accepts them. Return the encoders that used them."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    return encoders
