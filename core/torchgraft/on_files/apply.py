"""Create a new adapter for a checkpoint, without building the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchgraft.adapter_files.writing import Contents, SavedSite, also_saved, write
from torchgraft.checkpoint import fingerprint
from torchgraft.checkpoint.reading import Checkpoint
from torchgraft.disk import new_directory
from torchgraft.layers.layer import Layer
from torchgraft.layers.of_checkpoint import module_names
from torchgraft.layers.plan import Plan, site_of
from torchgraft.method.config import Config
from torchgraft.method.site import seed_of
from torchgraft.plugin.method_hooks import MethodHooks


def apply_to_checkpoint(
    checkpoint: Checkpoint,
    chosen: Plan,
    hooks: MethodHooks,
    config: Config,
    configs: Mapping[str, Config],
    output: Path,
    *,
    base: str,
    seed: int,
) -> None:
    """Initialize an adapter for the sites in `chosen`, with the options in `configs`, and write it to the new directory `output`."""
    modules = module_names(checkpoint)
    with new_directory(output) as directory:
        write(
            Contents(
                method=hooks.method,
                config=config,
                sites=[_site(checkpoint, layer, hooks, configs[layer.name], seed) for layer in chosen.sites],
                trained={name: _state(checkpoint, name) for name in chosen.trained},
                also_train=chosen.trained,
                also_saved={name: _state(checkpoint, name) for name in also_saved(chosen.trained, modules)},
                modules=modules,
                base=base,
            ),
            directory,
        )


def _site(checkpoint: Checkpoint, layer: Layer, hooks: MethodHooks, config: Config, seed: int) -> SavedSite:
    weight = layer.weight_name
    site = site_of(layer, read=lambda: checkpoint.read(weight))
    generator = torch.Generator().manual_seed(seed_of(seed, site.name))
    return SavedSite(site, config, hooks.init(site, config, generator), fingerprint.of_file(checkpoint, weight))


def _state(checkpoint: Checkpoint, module: str) -> dict[str, Any]:
    return {name.removeprefix(f"{module}."): checkpoint.read(name) for name in checkpoint.tensors if name.startswith(f"{module}.")}
