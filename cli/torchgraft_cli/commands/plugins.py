"""adapt plugins: what is installed, whether it does what it claims, and a new one."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote

import click

from torchgraft_cli.options import json_option, parse_settings
from torchgraft_cli.output import echo_json, plain


@click.group()
def plugins() -> None:
    """List the installed plugins, show, check or start one."""


@plugins.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the plugins, where each comes from, and what is wrong with those that cannot be used."""
    from torchgraft.plugin.registry import registry
    from torchgraft_cli.plugin_facts import listed, summary_of

    found = registry().plugins()
    if as_json:
        echo_json([listed(info) for info in found])
        return
    from torchgraft_cli.render import console, plain_table

    rows = [(info.name, f"{info.distribution} {info.version}", summary_of(info)) for info in found]
    console().print(plain_table(("plugin", "from", "what it does, or why it cannot be used"), rows))


@plugins.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what the plugin NAME provides; of a method, its options with types, defaults and ranges, and what it can do."""
    from torchgraft.plugin.registry import registry
    from torchgraft_cli.plugin_facts import described, in_facts

    document = described(registry().info(name))
    if as_json:
        echo_json(document)
        return
    from torchgraft_cli.render import console, facts, plain_table

    out = console()
    out.print(facts(in_facts(document)))
    if options := document.get("options"):
        rows = [(one["name"], "" if one["default"] is None else str(one["default"]), one["values"], one["help"]) for one in options]
        out.print()
        out.print(plain_table(("option", "default", "values", "what it is"), rows))


@plugins.command()
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="The new directory; by default torchgraft-NAME.")
@json_option
def new(name: str, output: Path | None, as_json: bool) -> None:
    """Write a package with a new method NAME: a working one to start from, with its tests."""
    from torchgraft.plugin.scaffold import distribution_of, new_plugin

    target = output or Path(distribution_of(name))
    written = new_plugin(name, target)
    if as_json:
        echo_json({"output": str(target), "files": [str(path.relative_to(target)) for path in written]})
        return
    click.echo(f"wrote {target}: {', '.join(str(path.relative_to(target)) for path in written)}")
    click.echo(f"next: pip install -e {quote(f'./{target}[test]' if not target.is_absolute() else f'{target}[test]')}")
    click.echo(f"then: adapt plugins check {name}")


@plugins.command()
@click.argument("name")
@click.option("--only", multiple=True, metavar="CHECK", help="Run this check and not the others. Repeatable.")
@click.option("--set", "settings", multiple=True, metavar="K=V", help="An option of the method: rank=16. Repeatable.")
@json_option
def check(name: str, only: tuple[str, ...], settings: tuple[str, ...], as_json: bool) -> None:
    """Test the method NAME on small layers of every kind that it claims. The exit code is 0 if nothing fails, else 2.

    It is the conformance kit, torchgraft.testing, that plugins also run in their own tests.
    """
    from torchgraft import testing

    report = testing.run_checks(name, only=only, options=parse_settings(list(settings)))
    if as_json:
        counts = {"passed": report.passed, "failed": report.failed, "skipped": report.skipped}
        results = [{"name": result.name, "outcome": result.outcome, "reason": result.reason} for result in report.checks]
        echo_json({"plugin": report.plugin, "ok": report.ok, **counts, "checks": results, "notes": list(report.notes)})
    else:
        from torchgraft_cli.render import console, plain_table

        rows = [(result.name, result.outcome, plain(result.reason)) for result in report.checks]
        console().print(plain_table(("check", "outcome", "on what, or why"), rows))
        for note in report.notes:
            click.echo(f"note: {plain(note)}")
        click.echo(report.verdict)
    sys.exit(0 if report.ok else 2)
