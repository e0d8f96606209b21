"""Draw the README's picture: the terminal output of `adapt inspect` on the demo's encoder. `make pictures` runs it, after the demo."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

from rich.console import Console

from torchgraft_cli.commands.inspect import show_memory, show_selection
from torchgraft_cli.options import choose

HERE = Path(__file__).parent
RUN = Path("demo-run")


def main() -> None:
    inspect = recorder(width=116)
    targets = ("@linear", "!pooler.dense")
    command = ["inspect", "encoder", *(word for target in targets for word in ("--target", target)), "--rank", "8"]
    inspect.print(f"[bold]$ adapt {shlex.join(command)}[/]")
    chosen = choose(str(RUN / "encoder"), "lora", targets, None, (), False, (), "8", None, (), ())
    show_selection(chosen, out=inspect)
    show_memory(chosen, out=inspect)
    save(inspect, "inspect.svg", "adapt inspect")


def recorder(width: int) -> Console:
    return Console(record=True, width=width, file=io.StringIO(), force_terminal=True, highlight=False)


def save(console: Console, name: str, title: str) -> None:
    directory = HERE / "pictures"
    directory.mkdir(exist_ok=True)
    # A fixed id, so that the file changes only if its content does.
    console.save_svg(str(directory / name), title=title, unique_id="torchgraft")
    print(directory / name)


if __name__ == "__main__":
    main()
