"""adapt check: does this adapter belong on this model?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from torchgraft_cli.options import json_option, kind_option, parse_kinds
from torchgraft_cli.output import echo_json, plain


@click.command(short_help="Report whether an adapter fits a model, and why not.")
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path))
@kind_option
@json_option
def check(model: str, adapter: Path, kinds: tuple[str, ...], as_json: bool) -> None:
    """Compare ADAPTER with MODEL, and list every problem. The exit code is 0 if it fits, else 2.

    If the two name the same layers differently, the mapping of names is shown.
    """
    from torchgraft.on_files.check import check as compare

    verdict = compare(model, adapter, parse_kinds(kinds))
    if as_json:
        echo_json(
            {"ok": not verdict.problems, "problems": verdict.problems, "renamed": dict(verdict.renamed), "notes": list(verdict.notes)}
        )
    else:
        for note in verdict.notes:
            click.echo(f"note: {plain(note)}")
        for problem in verdict.problems:
            click.echo(f"problem: {plain(problem)}")
        if not verdict.problems:
            click.echo(f"{adapter} fits {model}")
    sys.exit(2 if verdict.problems else 0)
