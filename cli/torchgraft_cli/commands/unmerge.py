"""adapt unmerge: restore the base from a merged checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from torchgraft_cli.options import json_option
from torchgraft_cli.output import echo_json


@click.command(short_help="Undo a merge: restore the base bit for bit.")
@click.argument("merged")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="The directory to write; it must not exist."
)
@click.option("--base", metavar="DIR", help="Copy the original tensors from the base instead of MERGED's undo record.")
@json_option
def unmerge(merged: str, output: Path, base: str | None, as_json: bool) -> None:
    """Undo the last merge into MERGED. Every restored tensor and file has the hash of the original, or nothing is written."""
    from torchgraft.on_files.unmerge import unmerge_checkpoint
    from torchgraft_cli.render import byte_progress

    with byte_progress("unmerging", shown=not as_json) as progress:
        report = unmerge_checkpoint(merged, output, base=base, progress=progress)
    if as_json:
        keys = ("restored_tensors", "copied_tensors", "files", "from_base")
        echo_json({"output": str(output), **{key: getattr(report, key) for key in keys}})
        return
    source = f" from {base}" if report.from_base else ""
    click.echo(f"wrote {output}: {report.restored_tensors} tensors restored, {report.copied_tensors} copied{source}")
    click.echo(f"the sha256 of every tensor and of all {report.files} files is that of the original")
