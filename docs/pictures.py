"""Draw the terminal output of `adapt inspect` and of the demo's closing table. Run by `make pictures`, after the demo."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from rich.console import Console

from torchgraft_cli.commands.inspect import show_memory, show_selection
from torchgraft_cli.options import choose

HERE = Path(__file__).parent
RUN = Path("demo-run")
sys.path.insert(0, str(HERE / "demo"))


def main() -> None:
    from demo import closing_table

    inspect = recorder(width=116)
    command = ["inspect", "encoder", "--target", "@linear", "--rank", "8"]
    inspect.print(f"[bold]$ adapt {' '.join(command)}[/]")
    chosen = choose(str(RUN / "encoder"), "lora", ("@linear",), None, (), False, (), "8", None, (), ())
    show_selection(chosen, out=inspect)
    show_memory(chosen, out=inspect)
    save(inspect, "inspect.svg", "adapt inspect")

    closing = recorder(width=80)
    closing.print(closing_table(json.loads((RUN / "summary.json").read_text())))
    save(closing, "demo.svg", "make demo")


def recorder(width: int) -> Console:
    return Console(record=True, width=width, file=io.StringIO(), force_terminal=True, highlight=False)


def save(console: Console, name: str, title: str) -> None:
    directory = HERE / "pictures"
    directory.mkdir(exist_ok=True)
    # A fixed id: the picture changes only if what it shows does.
    console.save_svg(str(directory / name), title=title, unique_id="torchgraft")
    print(directory / name)


if __name__ == "__main__":
    main()
