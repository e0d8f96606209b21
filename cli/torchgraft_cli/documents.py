"""The JSON documents that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchgraft_cli.options import Chosen

if TYPE_CHECKING:
    from torchgraft.layers.layer import Layer
    from torchgraft.layers.training_memory import Memory


def layer_document(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "role": layer.role,
        "shape": list(layer.shape),
        "dtype": layer.dtype,
        "params": layer.params,
    }


def selection_document(chosen: Chosen) -> dict[str, Any]:
    """Return the JSON document of a model and a selection of its layers."""
    from torchgraft.layers.plan import trainable_params

    trainable, total = trainable_params(chosen.plan, chosen.hooks, chosen.configs), chosen.plan.total_params
    return {
        **model_document(chosen.plan.layers),
        "matched": len(chosen.plan.sites),
        "patterns": chosen.plan.patterns,
        "sites": [layer.name for layer in chosen.plan.sites],
        "also_train": list(chosen.plan.trained),
        "trainable_params": trainable,
        "trainable_percent": 100 * trainable / total if total else 0.0,
    }


def model_document(layers: tuple[Layer, ...]) -> dict[str, Any]:
    return {
        "total_params": sum(layer.params for layer in layers),
        "total_bytes": sum(layer.bytes for layer in layers),
        "modules": [layer_document(layer) for layer in layers],
    }


def memory_document(memory: Memory) -> dict[str, int]:
    """Return the JSON document of a memory estimate, in bytes."""
    return {key: getattr(memory, key) for key in ("trainable", "weights", "adapter", "gradients", "optimizer", "total")}
