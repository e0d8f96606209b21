"""Tables, trees and progress bars with rich."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from torchgraft_cli.tree import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchgraft.layers.training_memory import Memory

PIPE_WIDTH = 160
PLAIN, BOLD, DIM, CYAN, GREEN = map(Style.parse, ("none", "bold", "dim", "cyan", "bold green"))


def console(*, stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; in a pipe, as COLUMNS states or wide enough for complete names."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


DROPPED_FIRST = ("dtype", "bytes", "share", "kind", "of dense", "shape")
"""Columns that a narrow terminal omits, in this order, because a truncated number would be wrong."""


TEXTS = ("module", "kind", "shape", "dtype")
"""Left-aligned columns."""
MIN_MODULE = 24
GAP = "  "


@dataclass(frozen=True)
class ModelTable:
    """The folded tree as aligned lines. rich's own tables take seconds for a model with 100,000 rows."""

    header: str
    lines: list[tuple[str, Style, str, str, Style]]
    """(label, its style, how often it is repeated, other cells, their style) of each line."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        yield Segment(f"{self.header}\n", BOLD)
        for label, style, times, cells, cells_style in self.lines:
            yield Segment(label, style)
            if times:
                yield Segment(times, CYAN)
            yield Segment(f"{cells}\n", cells_style)


def model_table(rows: Sequence[Row], total_params: int, out: Console, trained_name: str = "") -> ModelTable:
    """The folded tree, as wide as `out` lets it be. With `trained_name`: what that method trains, and its share of the dense weights."""
    numbers = ("params", "bytes", "share", *((f"{trained_name} trains", "of dense") if trained_name else ()))
    labels = [_label(row) for row in rows]
    looks = [_look(row) for row in rows]
    table = {
        look: _cells(*look, total_params, bool(trained_name)) for look in dict.fromkeys(looks)
    }  # rows with equal cells are formatted once
    columns = {name: [cells[place] for cells in table.values()] for place, name in enumerate((*TEXTS[1:], *numbers))}
    widths = {name: max(map(len, (name, *cells))) for name, cells in columns.items()}
    module = max([MIN_MODULE, *[wide for _, _, wide in labels]])
    for name in DROPPED_FIRST:
        if module + sum(len(GAP) + width for width in widths.values()) <= out.width:
            break
        widths.pop(name, None)
    module = min(module, max(1, out.width - sum(len(GAP) + width for width in widths.values())))
    adjust = {name: str.ljust if name in TEXTS else str.rjust for name in widths}
    places = [(place, adjust[name], widths[name]) for place, name in enumerate(columns) if name in widths]
    texts = {look: "".join([GAP + just(cells[place], width) for place, just, width in places]) for look, cells in table.items()}
    header = "module".ljust(module) + "".join(GAP + adjust[name](name, width) for name, width in widths.items())
    return ModelTable(header, [_line(row, label, module, texts[look]) for row, label, look in zip(rows, labels, looks, strict=True)])


def _label(row: Row) -> tuple[str, str, int]:
    """Return the indented name, how often it is repeated, and the width of both. Control characters are shown as codes."""
    name = row.label if row.label.isprintable() else "".join([c if c.isprintable() else ascii(c)[1:-1] for c in row.label])
    label, times = "  " * row.depth + name, f" ×{row.times}" if row.times > 1 else ""
    return label, times, len(times) + (len(label) if label.isascii() else cell_len(label))


def _line(row: Row, label: tuple[str, str, int], width: int, cells: str) -> tuple[str, Style, str, str, Style]:
    text, times, wide = label
    if wide > width:
        text, wide = set_cell_size(text, width - len(times) - 1) + "…", width
    style = (GREEN if row.trained else PLAIN) if row.layer else BOLD
    return text, style, times, (" " * (width - wide) + cells).rstrip(), PLAIN if row.layer and row.layer.kind else DIM


def _look(row: Row) -> tuple[str, tuple[int, ...], str, int, int, int]:
    """Return a row without its name: kind or role, shape, dtype, params, bytes, trained."""
    layer = row.layer
    if layer is None:
        return "", (), "", row.params, row.bytes, row.trained
    return layer.kind or layer.role, layer.shape, layer.dtype, row.params, row.bytes, row.trained


def _cells(
    kind: str, shape: tuple[int, ...], dtype: str, params: int, size_: int, trained: int, total_params: int, with_trained: bool
) -> tuple[str, ...]:
    dimensions = "×".join(map(str, shape)) or ("scalar" if kind else "")
    texts: tuple[str, ...] = (kind, dimensions, dtype, f"{params:,}", size(size_), percent(params, total_params))
    if with_trained:
        texts += (f"{trained:,}", percent(trained, params)) if trained else ("", "")
    return texts


def memory_table(memory: Mapping[str, Memory], chosen: str) -> Table:
    """Return a table with one row per method, the chosen one in bold."""
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
    """Return a table with one line per name and value."""
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
    """Show a progress bar on stderr if that is a terminal; yield the function (bytes written, total) that advances it."""
    if not shown or not sys.stderr.isatty():
        yield lambda _written, _total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda written, total: progress.update(task, advance=written, total=total)
