"""What commands print: text that is safe for a terminal, and JSON."""

from __future__ import annotations

from typing import Any

import click


def plain(text: str) -> str:
    """Return `text` as one line without control characters, because names in files can contain anything."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in " ".join(text.split()))


def echo_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    import json

    click.echo(json.dumps(document, indent=2, ensure_ascii=False))
