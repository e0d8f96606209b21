"""Log the calls of all methods' hooks: one line of JSON for each call, in the file named by TORCHGRAFT_AUDIT.

The plugin has no method. It wraps the hooks of all methods, and adds a command: `adapt audit FILE` summarizes the log.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import click

import torchgraft as tg
from torchgraft import hookimpl


@hookimpl(wrapper=True)
def adapter_init(site: Any) -> Generator[None, Any, Any]:
    return (yield from _timed("init", site=site.name))


@hookimpl(wrapper=True)
def adapter_merge(weight: Any) -> Generator[None, Any, Any]:
    return (yield from _timed("merge", shape=list(weight.shape)))


@hookimpl(wrapper=True)
def adapter_unmerge(weight: Any) -> Generator[None, Any, Any]:
    return (yield from _timed("unmerge", shape=list(weight.shape)))


@hookimpl
def register_commands(commands: click.Group) -> None:
    @commands.command()
    @click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
    def audit(file: Path) -> None:
        """Show how often each hook was called, and the total time."""
        try:
            entries = [json.loads(line) for line in file.read_text().splitlines()]
        except ValueError as error:
            raise click.ClickException(f"{file}: not a log of torchgraft-audit: {error}") from None
        seconds = Counter[str]()
        for entry in entries:
            seconds[entry["hook"]] += entry["seconds"]
        for hook, calls in Counter(entry["hook"] for entry in entries).items():
            click.echo(f"{hook}: {calls} calls, {seconds[hook]:.3f} s")


def _timed(hook: str, **details: Any) -> Generator[None, Any, Any]:
    """Time a hook: the yield calls the method's function and returns its result."""
    start = time.perf_counter()
    result = yield
    if file := os.environ.get("TORCHGRAFT_AUDIT"):
        entry = {"hook": hook, **details, "seconds": time.perf_counter() - start}
        try:
            with Path(file).open("a") as log:
                log.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise tg.TorchgraftError(f"TORCHGRAFT_AUDIT={file}: the log cannot be written: {error.strerror}") from None
    return result
