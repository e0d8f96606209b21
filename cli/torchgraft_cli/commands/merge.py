"""adapt merge: an adapter into a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from torchgraft_cli.main import echo_json
from torchgraft_cli.options import json_option, kind_option, parse_kinds


@click.command(short_help="Merge an adapter into a checkpoint.")
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="The directory to write; it must not exist."
)
@click.option("--no-verify", is_flag=True, help="Do not read the result back to compare it with the formula.")
@click.option("--no-undo", is_flag=True, help="Do not keep what 'adapt unmerge' needs.")
@kind_option
@click.option("--dry-run", is_flag=True, help="Check everything, and write nothing.")
@json_option
def merge(
    model: str, adapter: Path, output: Path, no_verify: bool, no_undo: bool, kinds: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Merge ADAPTER into MODEL and write the result to OUT, which loads like MODEL, without torchgraft."""
    from torchgraft.checkpoint import open_checkpoint
    from torchgraft.checkpoint_merge import merge_checkpoint
    from torchgraft_cli.render import byte_progress, size

    total = sum(header.path.stat().st_size for header in open_checkpoint(model).headers)
    with byte_progress("merging", total, shown=not as_json and not dry_run) as progress:
        report = merge_checkpoint(
            model, adapter, output, verify=not no_verify, undo=not no_undo, dry_run=dry_run, kinds=parse_kinds(kinds), progress=progress
        )
    document = {key: getattr(report, key) for key in ("merged_tensors", "copied_tensors", "total_bytes", "verified", "undo_bytes")}
    if as_json:
        echo_json({"output": None if dry_run else str(output), **document, "left_out": list(report.left_out)})
        return
    sums = f"{report.merged_tensors} tensors merged, {report.copied_tensors} copied, {size(report.total_bytes)}"
    if dry_run:
        click.echo(f"nothing was written (--dry-run); it would be {sums} in {output}")
        return
    click.echo(f"wrote {output}: {sums}")
    click.echo(
        "verified: sampled rows of each merged tensor agree with a float64 reference" if report.verified else "not verified (--no-verify)"
    )
    click.echo("it cannot be unmerged (--no-undo)" if no_undo else f"undo record: {size(report.undo_bytes)}, the adapter included")
