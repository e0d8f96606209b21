"""adapt merge: adapters into a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchgraft_cli.options import json_option, kind_option, parse_adapters, parse_kinds, parse_size
from torchgraft_cli.output import echo_json, plain

if TYPE_CHECKING:
    from torchgraft.on_files.merge import MergeReport


@click.command(short_help="Merge adapters into a checkpoint.")
@click.argument("model")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=FACTOR]...")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="The directory to write; it must not exist."
)
@click.option(
    "--dtype",
    default="",
    metavar="D",
    help="Write the floating weights as float32, float16, bfloat16 or float64. Quantized layers keep their dtypes.",
)
@click.option(
    "--onto",
    type=click.Choice(["quantized", "original"]),
    help="Merge into the weights as they were quantized for training (the default if they were), or into the base's own.",
)
@click.option("--max-shard-size", metavar="S", help="The most data in one weight file: 5GB, 500MB. By default, the base's own files.")
@click.option("--no-verify", is_flag=True, help="Do not read the result back and compare it with the formula.")
@click.option("--no-undo", is_flag=True, help="Do not write the undo record that 'adapt unmerge' needs.")
@click.option(
    "--allow-unchanged",
    is_flag=True,
    help="Merge although a weight stays as it is, because the adapter's change is zero or lost in rounding.",
)
@click.option("--leave-out", multiple=True, metavar="FILE", help="Do not merge these other trained weights beside an adapter. Repeatable.")
@kind_option
@click.option("--dry-run", is_flag=True, help="Show what would be done, from names, shapes and sizes, and write nothing.")
@json_option
def merge(
    model: str,
    adapters: tuple[str, ...],
    output: Path,
    dtype: str,
    onto: Any,
    max_shard_size: str | None,
    no_verify: bool,
    no_undo: bool,
    allow_unchanged: bool,
    leave_out: tuple[str, ...],
    kinds: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Merge each ADAPTER into MODEL and write the result to OUT, which loads like MODEL, without torchgraft.

    With factors, A=0.5 B=0.5, the changes are added with these factors: W + 0.5·ΔA + 0.5·ΔB.
    """
    from torchgraft.on_files.merge import merge_checkpoint
    from torchgraft_cli.render import byte_progress

    with byte_progress("merging", shown=not as_json and not dry_run) as progress:
        report = merge_checkpoint(
            model,
            parse_adapters(adapters),
            output,
            dtype=dtype,
            onto=onto,
            max_shard_size=parse_size(max_shard_size) if max_shard_size else 0,
            verify=not no_verify,
            undo=not no_undo,
            dry_run=dry_run,
            allow_unchanged=allow_unchanged,
            leave_out=leave_out,
            kinds=parse_kinds(kinds),
            progress=progress,
        )
    if as_json:
        echo_json(_document(report, dry_run))
    else:
        _show(report, dry_run, no_undo)


def _document(report: MergeReport, dry_run: bool) -> dict[str, Any]:
    keys = ("merged_tensors", "copied_tensors", "converted_tensors", "total_bytes", "verified", "undo_bytes", "memory")
    return {
        "output": None if dry_run else str(report.output),
        **{key: getattr(report, key) for key in keys},
        **{key: list(getattr(report, key)) for key in ("files", "notes", "left_out")},
        "changed": dict(report.changed),
    }


def _show(report: MergeReport, dry_run: bool, no_undo: bool) -> None:
    from torchgraft_cli.render import size

    for note in report.notes:
        click.echo(f"note: {plain(note)}")
    converted = f", {report.converted_tensors} converted" if report.converted_tensors else ""
    sums = f"{report.merged_tensors} tensors merged, {report.copied_tensors} copied{converted}, {size(report.total_bytes)}"
    if dry_run:
        more = f", … {report.files[-1]}" if len(report.files) > 1 else ""
        click.echo(f"nothing was written (--dry-run); it would be {sums}, in {report.output}")
        click.echo(f"weight files: {len(report.files)} ({report.files[0]}{more})")
        click.echo("no undo record (--no-undo)" if no_undo else f"undo record: about {size(report.undo_bytes)}")
        click.echo(f"memory: about {size(report.memory)}, beside what torch takes")
        return
    click.echo(f"wrote {report.output}: {sums}")
    if report.changed:
        click.echo(f"changed: {_range(report.changed)} of the entries of each merged tensor")
    click.echo(
        "verified: sampled rows of each merged tensor agree with a float64 reference, samples of the others with the base"
        if report.verified
        else "not verified (--no-verify)"
    )
    click.echo("it can be unmerged only with the base (--no-undo)" if no_undo else f"undo record: {size(report.undo_bytes)}")


def _range(shares: Mapping[str, float]) -> str:
    """Return the smallest share, with its tensor, and the largest: "3.1 % (a.weight) to 99.8 %"."""
    least = min(shares, key=shares.__getitem__)
    lowest, highest = (f"{100 * share:.1f} %" for share in (shares[least], max(shares.values())))
    return highest if lowest == highest else f"{lowest} ({least}) to {highest}"
