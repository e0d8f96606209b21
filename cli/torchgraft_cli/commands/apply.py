"""adapt apply: create a new adapter for a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

from torchgraft_cli.documents import selection_document
from torchgraft_cli.options import choose, json_option, selection_options
from torchgraft_cli.output import echo_json


@click.command(short_help="Create a new adapter for a model.")
@click.argument("model")
@click.option("--plugin", required=True, metavar="M", help="The method: see 'adapt plugins list'.")
@selection_options
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of the random initial values.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="ADAPTER", help="The directory to write; it must not exist."
)
@click.option("--dry-run", is_flag=True, help="Show what would be created, and write nothing.")
@json_option
def apply(model: str, plugin: str, seed: int, output: Path, dry_run: bool, as_json: bool, **selection: Any) -> None:
    """Create an initialized adapter for MODEL, ready for training: tg.load(model, ADAPTER).

    MODEL is a checkpoint directory, a .safetensors file or a hub id. The default of --target is
    @linear: every matrix except the output head.
    """
    from torchgraft.disk import refuse_existing
    from torchgraft.errors import SelectionError, TorchgraftWarning
    from torchgraft.layers.layer import shares_weight

    refuse_existing(output)
    chosen = choose(model, plugin, **selection)
    if not chosen.plan.sites:
        raise SelectionError("nothing is selected: there would be nothing to train")
    for layer in chosen.plan.sites:
        if layer.tie_problem:
            text = f"{shares_weight(layer.name, layer.tied)}: it can be trained, but not merged"
            warnings.warn(text, TorchgraftWarning, stacklevel=2)
    if not dry_run:
        from torchgraft.on_files.apply import apply_to_checkpoint

        apply_to_checkpoint(chosen.checkpoint, chosen.plan, chosen.hooks, chosen.config, chosen.configs, output, base=model, seed=seed)
    if as_json:
        echo_json({**selection_document(chosen), "method": plugin, "output": None if dry_run else str(output)})
        return
    from torchgraft_cli.show import show_selection

    show_selection(chosen, tree=dry_run)
    click.echo(f"nothing was written (--dry-run); without it: {output}" if dry_run else f"wrote {output}")
