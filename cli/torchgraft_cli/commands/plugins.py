"""adapt plugins: what is installed."""

from __future__ import annotations

from typing import Any

import click

from torchgraft_cli.main import echo_json
from torchgraft_cli.options import json_option


@click.group()
def plugins() -> None:
    """List the installed methods, and show one."""


@plugins.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the plugins, where each comes from, and what is wrong with those that cannot be used."""
    from torchgraft.manager import registry

    found = registry().plugins()
    if as_json:
        keys = ("name", "distribution", "version", "entry_point")
        echo_json([{**{key: getattr(info, key) for key in keys}, "error": info.error or None} for info in found])
        return
    from torchgraft_cli.render import console, plain_table

    summaries = {method.name: method.summary for method in registry().methods()}
    rows = [(info.name, f"{info.distribution} {info.version}", info.error or summaries.get(info.name, "(no method)")) for info in found]
    console().print(plain_table(("plugin", "from", "what it does, or why it cannot be used"), rows))


@plugins.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show the options of the method NAME: types, defaults, ranges."""
    from torchgraft.manager import registry

    method, info = registry().method(name), registry().info(name)
    fields = [_field_document(key, field) for key, field in method.config.model_json_schema()["properties"].items()]
    document = {
        "name": name,
        "summary": method.summary,
        "reference": method.reference,
        "distribution": info.distribution,
        "version": info.version,
        "entry_point": info.entry_point,
        "kinds": sorted(method.kinds) if method.kinds is not None else None,
        "options": fields,
    }
    if as_json:
        echo_json(document)
        return
    from torchgraft_cli.render import console, facts, plain_table

    out = console()
    kinds = ", ".join(sorted(method.kinds)) if method.kinds else "all kinds of layers"
    out.print(
        facts(
            {
                name: method.summary,
                "reference": method.reference,
                "from": f"{info.distribution} {info.version} ({info.entry_point})",
                "works on": kinds,
            }
        )
    )
    out.print()
    out.print(
        plain_table(
            ("option", "default", "values", "what it is"),
            [(f["name"], "" if f["default"] is None else str(f["default"]), f["values"], f["help"]) for f in fields],
        )
    )


def _field_document(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    schema = schema | next((form for form in schema.get("anyOf", ()) if form.get("type") != "null"), {})
    values = ", ".join(map(str, schema["enum"])) if "enum" in schema else schema.get("type", "")
    values += "".join(f" {sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema)
    return {"name": name, "default": schema.get("default"), "values": values, "help": schema.get("description", "")}
