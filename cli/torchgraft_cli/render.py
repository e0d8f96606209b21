"""All that is shown with rich."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchgraft_cli.tree import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchgraft.memory import Memory

PIPE_WIDTH = 160


def console(*, stderr: bool = False) -> Console:
    """A terminal's own width; in a pipe COLUMNS, or wide enough that names are whole."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


DROPPED_FIRST = ("dtype", "bytes", "share", "kind", "of dense", "shape")
"""Columns that a narrow terminal does without, in this order: a number cut short would be a wrong number."""


def model_table(rows: Sequence[Row], total_params: int, out: Console, trained_name: str = "") -> Table:
    """The folded tree, as wide as `out` lets it be. With `trained_name`: what that method trains, and its share of the dense weights."""
    dropped: set[str] = set()
    for name in (*DROPPED_FIRST, ""):
        table = _model_table(rows, total_params, trained_name, dropped)
        if out.measure(table, options=out.options.update(max_width=1000)).maximum <= out.width:
            break
        dropped.add(name)
    return table


def _model_table(rows: Sequence[Row], total_params: int, trained_name: str, dropped: set[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    texts = ("module", "kind", "shape", "dtype")
    numbers = ("params", "bytes", "share", *((f"{trained_name} trains", "of dense") if trained_name else ()))
    names = [name for name in (*texts, *numbers) if name not in dropped]
    for name in names:
        width = 24 if name == "module" else None
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True, overflow="ellipsis", min_width=width)
    for row in rows:
        cells = dict(zip((*texts, *numbers), _cells(row, total_params, bool(trained_name)), strict=True))
        table.add_row(*(cells[name] for name in names))
    return table


def _cells(row: Row, total_params: int, with_trained: bool) -> list[Text]:
    label = Text("  " * row.depth + row.label, style="bold green" if row.trained and row.layer else "" if row.layer else "bold")
    if row.times > 1:
        label.append(f" ×{row.times}", style="cyan")
    layer = row.layer
    texts = [
        (layer.kind or layer.role) if layer else "",
        "×".join(map(str, layer.shape)) or "scalar" if layer else "",
        layer.dtype if layer else "",
        f"{row.params:,}",
        size(row.bytes),
        percent(row.params, total_params),
    ]
    if with_trained:
        texts += [f"{row.trained:,}", percent(row.trained, row.params)] if row.trained else ["", ""]
    style = "" if layer and layer.kind else "dim"
    return [label, *(Text(text, style=style) for text in texts)]


def memory_table(memory: Mapping[str, Memory], chosen: str) -> Table:
    """A row for each method, the chosen one in bold."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "trained", "weights", "adapter", "gradients", "optimizer", "total"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name, of in memory.items():
        sizes = (of.weights, of.adapter, of.gradients, of.optimizer, of.total)
        style = "bold" if name == chosen else ""
        table.add_row(name, f"{of.trainable:,}", *map(size, sizes), style=style)
    return table


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def facts(pairs: Mapping[str, str]) -> Table:
    """Name and value, a line each."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, Text(value))
    return table


def size(number: float) -> str:
    """1536 → "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


def percent(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    return "" if not whole else f"{share:.2f} %" if share >= 0.005 or not part else "<0.01 %"


@contextmanager
def byte_progress(title: str, *, shown: bool) -> Iterator[Callable[[int, int], Any]]:
    """A bar on stderr, where that is a terminal; yields the function that advances it, by bytes of a total."""
    if not shown or not sys.stderr.isatty():
        yield lambda _written, _total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda written, total: progress.update(task, advance=written, total=total)
