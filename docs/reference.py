"""Write the reference pages from the code: docs/hooks.md, cli.md, api.md, and the tables of options in docs/methods/*.md.

`make reference` runs it. The pages are committed, and a test compares them with the code, because GitHub also shows them but runs
no sphinx extension, and because a review then shows how an interface changes.
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
    "Identity": ("Required of every method.", lambda name: name == "adapter_method"),
    "The four": ("Required of every method.", lambda name: name in hookspecs.METHOD_HOOKS),
    "Optional": ("A method may implement them.", lambda name: name.startswith("adapter_")),
    "Without a method": ("For plugins that provide a kind of layer or commands.", lambda name: True),
}
"""Group → introduction, and a test of a hook's name. A hook belongs to the first group whose test it passes."""

OF_THE_ENGINE = ("adapted",)
"""Methods that only torchgraft itself calls; they are omitted from the API page."""

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
    """Return file under docs/ → text."""
    methods = {f"methods/{name}.md": with_options(HERE / "methods" / f"{name}.md", name) for name in METHODS}
    return {"hooks.md": hooks_page(), "cli.md": cli_page(), "api.md": api_page(), **methods}


def hooks_page() -> str:
    hooks = {name: value for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")}
    group_of = {name: next(group for group, (_, fits) in HOOK_GROUPS.items() if fits(name)) for name in hooks}
    lines = [
        WRITTEN.format("core/torchgraft/plugin/hookspecs.py"),
        "# Plugin hooks\n",
        f"{text_of(hookspecs)}\n",
        "Guides: [write a method](plugins.md), [add a kind of layer](layer-kinds.md), [observe methods and add commands](observing.md).\n",
    ]
    for group, (what, _) in HOOK_GROUPS.items():
        lines.append(f"## {group}\n\n{what}\n")
        for name, hook in hooks.items():
            if group_of[name] == group:
                lines.append(f"### {name}\n\n{python(signature(hook))}\n\n{text_of(hook)}\n")
    return "\n".join(lines)


def cli_page() -> str:
    lines = [WRITTEN.format("the command itself"), "# The command `adapt`\n"]
    lines.append("The output of `--help`. Exit codes: 0 success, 2 invalid input, 1 internal error, 128+N if killed by signal N.\n")
    for context in contexts(adapt, "adapt"):
        lines.append(f"## {context.command_path}\n\n```text\n{context.get_help()}\n```\n")
    return "\n".join(lines)


def contexts(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    """Yield the contexts of a command and of all its subcommands."""
    context = click.Context(command, parent, name, **{**command.context_settings, "terminal_width": WIDTH})
    yield context
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            child = command.get_command(context, below)
            assert child is not None
            yield from contexts(child, below, context)


def api_page() -> str:
    lines = [WRITTEN.format("core/torchgraft/__init__.py"), "# Python API\n"]
    lines.append("All public names of torchgraft. `import torchgraft as tg` imports torch only when a name that needs it is used.\n")
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
    elif value is tg.hookimpl:  # pluggy's docstring describes pluggy
        parts = [
            "Marks a function of a plugin as the implementation of the [hook](hooks.md) with the same name; pluggy's `HookimplMarker`."
        ]
    else:
        function = inspect.unwrap(value)
        parts = [python(signature(function)), text_of(function)]
    return "\n\n".join([f"### tg.{name}", *filter(None, parts)]) + "\n"


def own_text(cls: type) -> str:
    """Return the docstring of a class, or "" for one that Python generated for a dataclass."""
    return "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else text_of(cls)


def members(cls: type) -> str:
    """List fields, methods and properties in source order, each with the first paragraph of its docstring."""
    lines = [f"`{shown}`{f': {text}' if text else ''}" for shown, text in (*fields(cls), *methods(cls))]
    return "\n".join(["Members:\n", *(f"- {line}" for line in lines)]) if lines else ""


def fields(cls: type) -> Iterator[tuple[str, str]]:
    """Yield the fields that the class declares, with the docstrings below them."""
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
    """Return the signature as in the source, on one line or with a line for each parameter."""
    returns = inspect.signature(function).return_annotation
    end = f") -> {returns}: ...".replace("'", '"') if returns is not inspect.Signature.empty else "): ..."
    own = parameters(function)
    line = f"def {function.__name__}({', '.join(own)}{end}"
    return line if len(line) <= WIDTH else "\n".join([f"def {function.__name__}(", *(f"    {part}," for part in own), end])


def parameters(function: Callable[..., Any]) -> list[str]:
    parts: list[str] = []
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
    """Return a docstring as Markdown, with its sections as lists."""
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
    """Return the page of a method with an up-to-date table of options."""
    before, _, rest = path.read_text().partition("<!-- options")
    _, _, after = rest.partition("<!-- end of options -->")
    return f"{before}<!-- options, written by make reference -->\n{options_table(method)}\n<!-- end of options -->{after}"


def options_table(method: str) -> str:
    shown = CliRunner().invoke(adapt, ["plugins", "show", method, "--json"], catch_exceptions=False)
    rows = [(f"`{o['name']}`", default_of(o), o["values"].replace("|", "\\|"), o["help"]) for o in json.loads(shown.output)["options"]]
    return "\n".join(["| option | default | values | description |", "|---|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)])


def default_of(option: dict[str, Any]) -> str:
    return "" if option["default"] is None else str(option["default"])


if __name__ == "__main__":
    main()
