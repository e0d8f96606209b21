"""What several commands show of a selection."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from torchgraft_cli.options import Chosen

if TYPE_CHECKING:
    from rich.console import Console

    from torchgraft.layers.training_memory import Memory


def show_memory(chosen: Chosen, out: Console | None = None) -> None:
    """Print the memory that training takes with each method on the same layers, on stdout or on `out`."""
    from torchgraft_cli.render import console, memory_table

    out = out or console()
    out.print("\nmemory for training (with Adam, without activations):")
    out.print(memory_table(memory_of(chosen), chosen.hooks.method.name))


def memory_of(chosen: Chosen) -> dict[str, Memory]:
    from torchgraft.layers.training_memory import full_memory, memory_of_methods

    return {"full": full_memory(chosen.plan), **memory_of_methods(chosen.plan, chosen.hooks, chosen.configs, chosen.settings)}


def show_selection(chosen: Chosen, depth: int | None = None, *, tree: bool = True, out: Console | None = None) -> None:
    """Print the tree of layers with the selected ones marked, and the totals, on stdout or on `out`."""
    from torchgraft.layers.plan import site_params
    from torchgraft_cli.render import console, model_table, percent
    from torchgraft_cli.tree import rows

    name, found = chosen.hooks.method.name, chosen.plan
    trained = {layer.name: site_params(layer, chosen.hooks, chosen.configs[layer.name]) for layer in found.sites}
    out = out or console()
    if tree:
        out.print(model_table(rows(found.layers, trained, depth), found.total_params, out, name), crop=False)
        out.print()
    own, dense = sum(trained.values()), sum(prod(layer.shape) for layer in found.sites)
    counts = ", ".join(f"{pattern} {count}" for pattern, count in found.patterns.items())
    out.print(f"{len(found.sites)} of {len(found.layers)} modules selected: {counts}")
    share = f"{percent(own, dense)} of the {dense:,} in the selected layers, " if dense else ""
    out.print(f"{name} trains {own:,} parameters: {share}{percent(own, found.total_params)} of the model's {found.total_params:,}")
    if found.trained:
        out.print(f"fully trained modules: {', '.join(found.trained)}, {found.trained_params:,} parameters")
