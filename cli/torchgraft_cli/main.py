"""The entry point `adapt`: imports a command when it is called, and turns every error into one line and an exit code."""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from importlib import import_module
from typing import Any, TextIO

import click

from torchgraft.errors import TorchgraftError, TorchgraftWarning
from torchgraft.version import __version__
from torchgraft_cli.output import plain
from torchgraft_cli.plugin_commands import plugin_commands

COMMANDS = ("inspect", "plugins", "apply", "check", "merge", "unmerge", "export")


class LazyGroup(click.Group):
    """Import each command from `commands/` when it is needed; the commands of plugins follow."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *_of_plugins(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return _of_plugins(ctx).get(cmd_name)
        command: click.Command = getattr(import_module(f"torchgraft_cli.commands.{cmd_name}"), cmd_name)
        return command


def _of_plugins(ctx: click.Context) -> dict[str, click.Command]:
    """Return the commands of plugins, loaded once per run."""
    found: dict[str, click.Command] | None = ctx.meta.get(__name__)
    if found is None:
        found = ctx.meta[__name__] = plugin_commands(COMMANDS)
    return found


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="adapt")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def adapt(debug: bool) -> None:
    """Inspect models, and create, check, merge and unmerge their adapters.

    \b
    A typical sequence:  inspect → apply → train (in Python) → check → merge.
    Exit codes:  0 success, 2 invalid input, 1 internal error, 128+N if killed by signal N.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run `adapt` and exit: 0 success, 1 internal error, 2 invalid input."""
    warnings.showwarning = _show_warning
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    _prepare_process()
    try:
        adapt.main(arguments, prog_name="adapt", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except (TorchgraftError, click.ClickException, OSError) as error:
        _fail(_one_line(error), 2, debug)
    except TerminatedError as error:
        _fail("terminated; nothing was left behind", 128 + error.args[0], debug)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was left behind", 128 + signal.SIGINT, debug)
    except Exception as error:  # noqa: BLE001  (any other error is a bug, and is reported as one)
        hint = "" if debug else "; please report it with the output of adapt --debug …"
        where = next(iter(getattr(error, "__notes__", ())), "adapt")
        _fail(f"a bug in {where}: {type(error).__name__}: {error}{hint}", 1, debug)


class TerminatedError(BaseException):
    """SIGTERM or SIGHUP was received; the argument is its number. Unwinding cleans up, as it does for an interrupt."""


IMPATIENCE = 1.0
"""Seconds in which further signals are ignored, so that several in a row do not interrupt the cleaning up."""


class SignalHandler:
    """Raises at a signal, unless another one has just been raised."""

    def __init__(self) -> None:
        self._last = -IMPATIENCE

    def __call__(self, number: int, *_: Any) -> None:
        now = time.monotonic()
        if now - self._last < IMPATIENCE:
            return
        self._last = now
        raise KeyboardInterrupt if number == signal.SIGINT else TerminatedError(number)


def run() -> None:
    """Run `main` as the installed command, and exit without Python's teardown, which takes half a second with torch."""
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _prepare_process() -> None:
    """Set up the process: ? for characters that the terminal lacks, a silent end if a pipe's reader is gone, signals that clean up."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        handler = SignalHandler()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, handler)


def _one_line(error: Exception) -> str:
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "adapt"
        return f"{error.format_message()} See '{where} --help'."
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    click.echo(f"error: {plain(message)}", err=True)
    sys.exit(code)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    if issubclass(category, TorchgraftWarning):
        click.echo(f"warning: {plain(str(message))}", err=True)
