"""adapt plugins: what is installed, and a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from torchgraft_cli.main import echo_json
from torchgraft_cli.options import json_option
from torchgraft_cli.plugin_facts import capabilities, capabilities_in_words, in_words


@click.group()
def plugins() -> None:
    """List the installed plugins, show, check or start one."""


@plugins.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the plugins, where each comes from, and what is wrong with those that cannot be used."""
    from torchgraft.manager import registry

    found = registry().plugins()
    provided = {info.name: registry().provides(info.name) for info in found if not info.error}
    if as_json:
        keys = ("name", "distribution", "version", "entry_point")
        documents = [{key: getattr(info, key) for key in keys} for info in found]
        extra = [{"error": info.error or None, "provides": list(provided.get(info.name, ()) if not info.error else ())} for info in found]
        echo_json([document | more for document, more in zip(documents, extra, strict=True)])
        return
    from torchgraft_cli.render import console, plain_table

    summaries = {method.name: method.summary for method in registry().methods()}
    rows = [
        (
            info.name,
            f"{info.distribution} {info.version}",
            f"cannot be used: {info.error}; {info.way_out}" if info.error else summaries.get(info.name) or in_words(provided[info.name]),
        )
        for info in found
    ]
    console().print(plain_table(("plugin", "from", "what it does, or why it cannot be used"), rows))


@plugins.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what the plugin NAME provides; of a method, its options with types, defaults and ranges, and what it can do."""
    from torchgraft.manager import registry

    info, provides = registry().info(name), registry().provides(name)
    document: dict[str, Any] = {
        "name": name,
        "distribution": info.distribution,
        "version": info.version,
        "entry_point": info.entry_point,
        "provides": list(provides),
    }
    about = {name: in_words(provides), "from": f"{info.distribution} {info.version} ({info.entry_point})"}
    fields: list[dict[str, Any]] = []
    if "adapter_method" in provides:
        hooks = registry().hooks(name)
        method = hooks.method
        fields = [_field_document(key, field) for key, field in method.config.model_json_schema().get("properties", {}).items()]
        document |= {
            "summary": method.summary,
            "reference": method.reference,
            "kinds": sorted(method.kinds) if method.kinds is not None else None,
            "capabilities": capabilities(hooks),
            "options": fields,
        }
        kinds = ", ".join(sorted(method.kinds)) if method.kinds else "all kinds of layers"
        about |= {name: method.summary, "reference": method.reference, "works on": kinds, **capabilities_in_words(hooks)}
    if as_json:
        echo_json(document)
        return
    from torchgraft_cli.render import console, facts, plain_table

    out = console()
    out.print(facts(about))
    if fields:
        rows = [(f["name"], "" if f["default"] is None else str(f["default"]), f["values"], f["help"]) for f in fields]
        out.print()
        out.print(plain_table(("option", "default", "values", "what it is"), rows))


@plugins.command()
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="The new directory; by default torchgraft-NAME.")
@json_option
def new(name: str, output: Path | None, as_json: bool) -> None:
    """Write a package with a new method NAME: a working one to start from, with its tests."""
    from torchgraft.scaffold import distribution_of, new_plugin

    target = output or Path(distribution_of(name))
    written = new_plugin(name, target)
    if as_json:
        echo_json({"output": str(target), "files": [str(path.relative_to(target)) for path in written]})
        return
    click.echo(f"wrote {target}: {', '.join(str(path.relative_to(target)) for path in written)}")
    click.echo(f"next: pip install -e '{target}[test]', then adapt plugins check {name}")


def _field_document(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    schema = schema | next((form for form in schema.get("anyOf", ()) if form.get("type") != "null"), {})
    values = ", ".join(map(str, schema["enum"])) if "enum" in schema else schema.get("type", "")
    values += "".join(f" {sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema)
    return {"name": name, "default": schema.get("default"), "values": values, "help": schema.get("description", "")}
