"""adapt check: does this adapter belong on this model?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from torchgraft_cli.main import echo_json
from torchgraft_cli.options import json_option, kind_option, parse_kinds


@click.command(short_help="Tell whether an adapter fits a model.")
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path))
@kind_option
@json_option
def check(model: str, adapter: Path, kinds: tuple[str, ...], as_json: bool) -> None:
    """Compare ADAPTER with MODEL and list everything that does not fit. Exits with 0 if all does, else with 2.

    Where the two name the same layers differently, it says how the names were read.
    """
    from torchgraft.adapter_files import read_adapter
    from torchgraft.bases import base_of_checkpoint
    from torchgraft.checkpoint import open_checkpoint
    from torchgraft.pairing import check as compare

    files = read_adapter(adapter)
    problems, renamed, note = compare(files, base_of_checkpoint(open_checkpoint(model), parse_kinds(kinds)))
    if as_json:
        echo_json({"ok": not problems, "problems": problems, "renamed": renamed})
    elif not problems:
        click.echo(f"{adapter} fits {model}")
    for line in [] if as_json else [f"note: {note}"] * bool(note) + [f"problem: {problem}" for problem in problems]:
        click.echo(line)
    sys.exit(2 if problems else 0)
