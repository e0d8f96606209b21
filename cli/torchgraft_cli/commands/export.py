"""adapt export: an adapter for tools that read PEFT's formats alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from torchgraft_cli.options import json_option, kind_option, parse_kinds
from torchgraft_cli.output import echo_json


@click.command(short_help="Write an adapter for other tools.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--to", required=True, type=click.Choice(["lora", "peft"]), help="PEFT's plain LoRA, or the type that PEFT has for the method."
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="The directory to write; it must not exist."
)
@click.option("--base", metavar="MODEL", help="The adapter's base; needed with --rank, and if PEFT wrote the adapter.")
@click.option("-r", "--rank", type=click.IntRange(min=1), metavar="R", help="Rank of the nearest LoRA, for a method that is not a LoRA.")
@kind_option
@json_option
def export(
    adapter: Path, to: Literal["lora", "peft"], output: Path, base: str | None, rank: int | None, kinds: tuple[str, ...], as_json: bool
) -> None:
    """Write ADAPTER in PEFT's format to OUT, for tools that read no other.

    With --to lora, AdaLoRA and the like are folded into plain LoRA factors with one lora_alpha. A method whose change is
    no LoRA is refused, unless --rank and --base ask for the nearest one; its error is then reported.
    """
    from torchgraft.on_files.export import export_adapter
    from torchgraft_cli.render import percent

    report = export_adapter(adapter, output, to, base=base, rank=rank, kinds=parse_kinds(kinds))
    if as_json:
        document = {"output": str(output), "sites": report.sites, "left_out": list(report.left_out), "errors": report.errors}
        echo_json(document)
        return
    click.echo(f"wrote {output}: {report.sites} layers")
    if report.left_out:
        click.echo(f"skipped (rank 0): {', '.join(report.left_out)}")
    if report.errors:
        worst = max(report.errors, key=lambda name: report.errors[name])
        mean = sum(report.errors.values()) / len(report.errors)
        click.echo(
            f"not the same function: of the change of a weight, rank {rank} misses {percent(mean, 1)} on average, "
            f"{percent(report.errors[worst], 1)} at most ({worst})"
        )
