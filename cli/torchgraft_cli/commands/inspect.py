"""adapt inspect: show the layers of a model, and what an adapter on it would cost."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from torchgraft_cli.documents import memory_document, model_document, selection_document
from torchgraft_cli.options import DEFAULT_PLUGIN, Chosen, choose, json_option, parse_kinds, selection_options
from torchgraft_cli.output import echo_json
from torchgraft_cli.show import memory_of, show_memory, show_selection

INDENTED = 10_000
"""Number of modules up to which JSON is indented. Longer documents are read by programs, and written five times as fast in one line."""


@click.command(short_help="Show the layers of a model, and what an adapter would cost.")
@click.argument("source")
@click.option("--plugin", metavar="M", help=f"The method to count with [default: {DEFAULT_PLUGIN}].")
@selection_options
@click.option("--depth", type=click.IntRange(min=1), help="Show the tree down to this level.")
@json_option
def inspect(source: str, plugin: str | None, depth: int | None, as_json: bool, **selection: Any) -> None:
    """Show the layers of SOURCE: a checkpoint directory, a .safetensors file or a hub id.

    With --target or --plugin it also shows which layers are selected, how many parameters the method would train there,
    their share of the dense weights, and how much memory training would take. Only headers are read; no model is built.
    """
    with _collector_off():
        if plugin or any(value for key, value in selection.items() if key != "kinds"):
            _inspect_selection(choose(source, plugin or DEFAULT_PLUGIN, **selection), depth, as_json)
        else:
            _inspect_model(source, selection["kinds"], depth, as_json)


def _inspect_selection(chosen: Chosen, depth: int | None, as_json: bool) -> None:
    if as_json:
        _echo({**selection_document(chosen), "memory": {name: memory_document(of) for name, of in memory_of(chosen).items()}})
    else:
        show_selection(chosen, depth)
        show_memory(chosen)


def _inspect_model(source: str, kinds: tuple[str, ...], depth: int | None, as_json: bool) -> None:
    from torchgraft.checkpoint.reading import open_checkpoint
    from torchgraft.layers.of_checkpoint import layers_of_checkpoint

    layers = tuple(layers_of_checkpoint(open_checkpoint(source), parse_kinds(kinds)))
    if as_json:
        _echo(model_document(layers))
        return
    from torchgraft_cli.render import console, model_table, size
    from torchgraft_cli.tree import rows

    out, total = console(), sum(layer.params for layer in layers)
    out.print(model_table(rows(layers, {}, depth), total, out), crop=False)
    out.print(f"\n{len(layers)} modules, {total:,} parameters, {size(sum(layer.bytes for layer in layers))}")


def _echo(document: dict[str, Any]) -> None:
    if len(document["modules"]) <= INDENTED:
        echo_json(document)
    else:
        click.echo(json.dumps(document, ensure_ascii=False))


@contextmanager
def _collector_off() -> Iterator[None]:
    """Switch the garbage collector off: a large header becomes a million objects without cycles, which it would visit repeatedly."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
