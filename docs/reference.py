"""Write the reference pages from what they describe: docs/hooks.md, cli.md, api.md, and the options in docs/methods/*.md.

Run by `make reference`. The output is checked in, and a test compares it: GitHub shows these pages, too, and runs no
sphinx extension; and a change of an interface shows up in the review of its docs.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import click
from click.testing import CliRunner

import torchgraft as tg
from torchgraft.plugin import hookspecs
from torchgraft_cli.main import adapt

HERE = Path(__file__).parent
METHODS = ("lora", "loraplus", "adalora", "qlora", "dora")
WIDTH = 88
WRITTEN = "<!-- written by make reference from {} -->\n"

HOOK_GROUPS = {
    "Identity": ("Every method has it.", lambda name: name == "adapter_method"),
    "The four": ("Every method has them.", lambda name: name in hookspecs.METHOD_HOOKS),
    "Optional": ("A method may have them.", lambda name: name.startswith("adapter_")),
    "Without a method": ("For plugins that bring something else.", lambda name: True),
}
"""A hook is in the first group that fits."""

OF_THE_ENGINE = ("adapted",)
"""Methods of public classes that only the engine calls."""

API_GROUPS = {
    "Adapters on a model": "plan Plan apply load adapters activate Adapter Count load_quantized",
    "Merging on files": "merge_checkpoint MergeReport unmerge_checkpoint export_adapter ExportReport",
    "For plugins": (
        "hookimpl Method Config LowRankConfig Site Kind factor_shapes factors init_factors scaled_param_groups LowRankPeft PeftFormat "
        "Resize SitePart Quantization quantized_linear seed_of Registry registry"
    ),
    "Errors": (
        "TorchgraftError SelectionError ConfigError PluginError FileFormatError PairingError AttachError MergeError TorchgraftWarning"
    ),
}


def main() -> None:
    for name, text in pages().items():
        (HERE / name).write_text(text)
        print(f"docs/{name}")


def pages() -> dict[str, str]:
    """File under docs/ → what it should hold."""
    methods = {f"methods/{name}.md": with_options(HERE / "methods" / f"{name}.md", name) for name in METHODS}
    return {"hooks.md": hooks_page(), "cli.md": cli_page(), "api.md": api_page(), **methods}


def hooks_page() -> str:
    hooks = {name: value for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")}
    group_of = {name: next(group for group, (_, fits) in HOOK_GROUPS.items() if fits(name)) for name in hooks}
    lines = [
        WRITTEN.format("core/torchgraft/plugin/hookspecs.py"),
        "# Hooks\n",
        f"{text_of(hookspecs)}\n",
        "[How to write a method](plugins.md).\n",
    ]
    for group, (what, _) in HOOK_GROUPS.items():
        lines.append(f"## {group}\n\n{what}\n")
        for name, hook in hooks.items():
            if group_of[name] == group:
                lines.append(f"### {name}\n\n{python(signature(hook))}\n\n{text_of(hook)}\n")
    return "\n".join(lines)


def cli_page() -> str:
    lines = [WRITTEN.format("the command itself"), "# The command `adapt`\n"]
    lines.append("What `--help` prints. Exit codes: 0 done, 2 your input, 1 a bug of ours; 128 and the signal's number if one ended it.\n")
    for context in contexts(adapt, "adapt"):
        lines.append(f"## {context.command_path}\n\n```text\n{context.get_help()}\n```\n")
    return "\n".join(lines)


def contexts(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    """Of the command and all below it."""
    context = click.Context(command, parent, name, **{**command.context_settings, "terminal_width": WIDTH})
    yield context
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            child = command.get_command(context, below)
            assert child is not None
            yield from contexts(child, below, context)


def api_page() -> str:
    lines = [WRITTEN.format("core/torchgraft/__init__.py"), "# Python\n"]
    lines.append("All public names; `import torchgraft as tg` loads torch only when one of them needs it.\n")
    grouped = {group: names.split() for group, names in API_GROUPS.items()}
    known = {"__version__", *(name for names in grouped.values() for name in names)}
    grouped["More"] = [name for name in tg.__all__ if name not in known]
    for group, names in grouped.items():
        if names:
            lines += [f"## {group}\n", *(api_entry(name, getattr(tg, name)) for name in names)]
    return "\n".join(lines)


def api_entry(name: str, value: Any) -> str:
    if inspect.isclass(value):
        is_error = issubclass(value, Exception)
        parts = [f"`{value.__bases__[0].__name__}`. {text_of(value)}" if is_error else own_text(value), members(value)]
    elif isinstance(value, ModuleType):
        parts = [text_of(value)]
    elif value is tg.hookimpl:  # pluggy's own text is about pluggy
        parts = ["Marks a function of a plugin as the implementation of the [hook](hooks.md) of its name; pluggy's `HookimplMarker`."]
    else:
        function = inspect.unwrap(value)
        parts = [python(signature(function)), text_of(function)]
    return "\n\n".join([f"### tg.{name}", *filter(None, parts)]) + "\n"


def own_text(cls: type) -> str:
    """Its docstring, without the one that Python makes for a dataclass."""
    return "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else text_of(cls)


def members(cls: type) -> str:
    """Its fields, methods and properties, in their order, each with the beginning of its docstring."""
    lines = [f"`{shown}`{f': {text}' if text else ''}" for shown, text in (*fields(cls), *methods(cls))]
    return "\n".join(["Members:\n", *(f"- {line}" for line in lines)]) if lines else ""


def fields(cls: type) -> Iterator[tuple[str, str]]:
    """Declared in the class, with the docstrings below them."""
    tree = ast.parse(dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.target).startswith("_"):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            text = inspect.cleandoc(following.value.value) if is_text else ""
            yield f"{ast.unparse(statement.target)}: {ast.unparse(statement.annotation)}", first_paragraph(text)


def methods(cls: type) -> Iterator[tuple[str, str]]:
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or name in OF_THE_ENGINE or not inspect.isfunction(function := inspect.unwrap(function)):
            continue
        shown = name if isinstance(member, property) else f"{name}({', '.join(parameters(function))})"
        yield shown, first_paragraph(inspect.getdoc(function) or "")


def first_paragraph(text: str) -> str:
    first = text.partition("\n\n")[0]
    return "" if first.startswith(("Raises:", "Args:")) else " ".join(first.split())


def signature(function: Callable[..., Any]) -> str:
    """As it stands in the source, one line or a line for each parameter."""
    returns = inspect.signature(function).return_annotation
    end = f") -> {returns}: ...".replace("'", '"') if returns is not inspect.Signature.empty else "): ..."
    own = parameters(function)
    line = f"def {function.__name__}({', '.join(own)}{end}"
    return line if len(line) <= WIDTH else "\n".join([f"def {function.__name__}(", *(f"    {part}," for part in own), end])


def parameters(function: Callable[..., Any]) -> list[str]:
    parts = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        typed = f": {parameter.annotation}".replace("'", '"') if parameter.annotation is not parameter.empty else ""
        default = "" if parameter.default is parameter.empty else f"{' = ' if typed else '='}{shown_default(parameter.default)}"
        parts.append(f"{stars}{parameter.name}{typed}{default}")
    return parts


def shown_default(value: Any) -> str:
    return "..." if callable(value) else json.dumps(value) if isinstance(value, str) else repr(value)


def python(code: str) -> str:
    return f"```python\n{code}\n```"


def text_of(thing: Any) -> str:
    """Its docstring as Markdown: sections as lists."""
    paragraphs = (inspect.getdoc(thing) or "").split("\n\n")
    return "\n\n".join(map(as_markdown, paragraphs)).strip()


def as_markdown(paragraph: str) -> str:
    section = re.match(r"(Args|Raises):\n", paragraph)
    if section is None:
        return paragraph if paragraph.startswith((" ", "|", "-")) else re.sub(r"\n +", "\n", paragraph)
    items = re.split(r"\n(?=\S)", dedent(paragraph[section.end() :]))
    entries = (re.sub(r"\s+", " ", item) for item in items)
    return f"{section[1]}:\n\n" + "\n".join("- " + re.sub(r"^([\w, ]+):", r"`\1`:", entry) for entry in entries)


def with_options(path: Path, method: str) -> str:
    """The page with its table of options as they are now."""
    before, _, rest = path.read_text().partition("<!-- options")
    _, _, after = rest.partition("<!-- end of options -->")
    return f"{before}<!-- options, written by make reference -->\n{options_table(method)}\n<!-- end of options -->{after}"


def options_table(method: str) -> str:
    shown = CliRunner().invoke(adapt, ["plugins", "show", method, "--json"], catch_exceptions=False)
    rows = [(f"`{o['name']}`", default_of(o), o["values"].replace("|", "\\|"), o["help"]) for o in json.loads(shown.output)["options"]]
    return "\n".join(["| option | default | values | what it is |", "|---|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)])


def default_of(option: dict[str, Any]) -> str:
    return "" if option["default"] is None else str(option["default"])


if __name__ == "__main__":
    main()
