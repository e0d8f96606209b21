"""Commands that plugins add to `adapt`, by the hook register_commands."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import click

from torchgraft.errors import PluginError, TorchgraftError, TorchgraftWarning

if TYPE_CHECKING:
    from torchgraft.plugin.info import PluginInfo


def plugin_commands(taken: Collection[str]) -> dict[str, click.Command]:
    """Return name → command of all plugins. A plugin that fails causes a warning, and affects no other command.

    Args:
        taken: names that plugins cannot use.
    """
    if not _any_third_party():
        return {}
    from torchgraft.plugin.registry import registry

    owners: dict[str, str] = dict.fromkeys(taken, "adapt itself")
    found: dict[str, click.Command] = {}
    for info, register in registry().implementations("register_commands"):
        own = click.Group()
        try:
            with redirect_stdout(sys.stderr):
                register(commands=own)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (third-party code: its failure must not break other commands)
            _left_out(info, f"its register_commands failed: {type(error).__name__}: {error}")
            continue
        for name, command in own.commands.items():
            if not isinstance(command, click.Command):
                _left_out(info, f"its command {name!r} is a {type(command).__name__}, not a click.Command")
                continue
            if name in owners:
                _left_out(info, f"its command {name!r} has the name of one of {owners[name]}")
                continue
            owners[name], found[name] = str(info), _attributed(command, info)
    return found


def _any_third_party() -> bool:
    """Return whether third-party plugins may be installed: if not, `adapt --help` need not load the registry, which takes 0.1 s."""
    if "torchgraft.plugin.registry" in sys.modules:
        return True
    return any(point.dist is None or point.dist.name != "torchgraft" for point in entry_points(group="torchgraft"))


def _left_out(info: PluginInfo, reason: str) -> None:
    from torchgraft.plugin.info import is_strict

    text = f"the plugin {info}: {reason}; {info.way_out}"
    if is_strict():
        raise PluginError(text)
    warnings.warn(text, TorchgraftWarning, stacklevel=3)


def _attributed(command: click.Command, info: PluginInfo) -> click.Command:
    """Wrap the command so that an unexpected error names its plugin."""
    command.invoke = partial(_invoke, command.invoke, info)  # type: ignore[method-assign]
    return command


def _invoke(invoke: Any, info: PluginInfo, ctx: click.Context) -> Any:
    try:
        return invoke(ctx)
    except (TorchgraftError, click.ClickException, click.exceptions.Exit, click.Abort, OSError):
        raise
    except Exception as error:
        error.add_note(f"the plugin {info}")
        raise
