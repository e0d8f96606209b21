"""adapt unmerge: the base back from a merged checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from torchgraft_cli.main import echo_json
from torchgraft_cli.options import json_option


@click.command(short_help="Take a merged adapter out again.")
@click.argument("merged")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="The directory to write; it must not exist."
)
@json_option
def unmerge(merged: str, output: Path, as_json: bool) -> None:
    """Take the adapter out of MERGED again: every file has the hash of the original, or nothing is written."""
    from torchgraft.checkpoint import open_checkpoint
    from torchgraft.checkpoint_unmerge import unmerge_checkpoint
    from torchgraft_cli.render import byte_progress

    total = sum(header.path.stat().st_size for header in open_checkpoint(merged).headers)
    with byte_progress("unmerging", total, shown=not as_json) as progress:
        report = unmerge_checkpoint(merged, output, progress=progress)
    if as_json:
        keys = ("restored_tensors", "copied_tensors", "files")
        echo_json({"output": str(output), **{key: getattr(report, key) for key in keys}})
        return
    click.echo(f"wrote {output}: {report.restored_tensors} tensors restored, {report.copied_tensors} copied")
    click.echo(f"the sha256 of all {report.files} files is that of the original")
