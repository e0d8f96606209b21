"""Options that several commands share, and the selection that they describe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from torchgraft.errors import ConfigError

if TYPE_CHECKING:
    from torchgraft.checkpoint.reading import Checkpoint
    from torchgraft.layers.plan import Plan
    from torchgraft.method.config import Config
    from torchgraft.plugin.method_hooks import MethodHooks

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_PLUGIN = "lora"
"""The method that `inspect` counts with if none is given."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
kind_option = click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="P=KIND",
    help="The kind of layers that cannot be inferred from the files: 'proj=Linear'. Repeatable.",
)


def selection_options(command: F) -> F:
    """--target, --layers, --also-train, --allow-unmatched, --set, --rank, --alpha, --override, --kind."""
    for option in reversed(
        [
            click.option(
                "--target",
                "targets",
                multiple=True,
                metavar="P",
                help="A pattern of layers: a name, a glob, re:…, @role; ! excludes. Repeatable.",
            ),
            click.option("--layers", metavar="R", help="Only in these blocks: 0-15,20."),
            click.option(
                "--also-train",
                multiple=True,
                metavar="P",
                help="A module to train fully beside the adapter (PEFT's modules_to_save). Repeatable.",
            ),
            click.option("--allow-unmatched", is_flag=True, help="Accept patterns that match nothing."),
            click.option("--set", "settings", multiple=True, metavar="K=V", help="An option of the method: rank=16. Repeatable."),
            click.option("-r", "--rank", metavar="N", help="Short for --set rank=N."),
            click.option("--alpha", metavar="X", help="Short for --set alpha=X."),
            click.option(
                "--override",
                "overrides",
                nargs=2,
                multiple=True,
                metavar="P K=V",
                help="An option for the layers that P matches. Repeatable.",
            ),
            kind_option,
        ]
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Chosen:
    """A checkpoint, and the adapter that the options describe."""

    checkpoint: Checkpoint
    plan: Plan
    hooks: MethodHooks
    config: Config
    configs: dict[str, Config]
    settings: dict[str, Any]
    """The options of the method that were given explicitly."""


def choose(
    source: str,
    plugin: str,
    targets: tuple[str, ...],
    layers: str | None,
    also_train: tuple[str, ...],
    allow_unmatched: bool,
    settings: tuple[str, ...],
    rank: str | None,
    alpha: str | None,
    overrides: tuple[tuple[str, str], ...],
    kinds: tuple[str, ...],
) -> Chosen:
    """Apply the selection options to the checkpoint `source`."""
    from torchgraft.checkpoint.reading import open_checkpoint
    from torchgraft.layers.plan import configure, plan
    from torchgraft.method.config import parse_config
    from torchgraft.plugin.registry import registry

    shortcuts = [f"{key}={value}" for key, value in (("rank", rank), ("alpha", alpha)) if value is not None]
    method = registry().method(plugin)
    given = parse_settings([*settings, *shortcuts])
    config = parse_config(plugin, method.config, given)
    checkpoint = open_checkpoint(source)
    chosen = plan(checkpoint, targets or None, layers, also_train=also_train, kinds=parse_kinds(kinds), allow_unmatched=allow_unmatched)
    hooks = registry().hooks(plugin)
    own: dict[str, dict[str, Any]] = {}
    for pattern, setting in overrides:
        own.setdefault(pattern, {}).update(parse_settings([setting]))
    return Chosen(checkpoint, chosen, hooks, config, configure(chosen.sites, hooks, config, own), given)


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """ "rank=16" → {"rank": 16}; a value that is not JSON is a string.

    Raises:
        ConfigError: there is no `=`, or one key has two values.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"{setting!r} is not an option and its value; write it like rank=16")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if repr(found.setdefault(key, value)) != repr(value):
            raise ConfigError(f"{key} is given twice, as {found[key]!r} and as {value!r}")
    return found


def parse_kinds(kinds: tuple[str, ...]) -> dict[str, str]:
    """("proj=Linear",) → {"proj": "Linear"}.

    Raises:
        ConfigError: there is no `=`.
        PluginError: there is no such kind.
    """
    if not kinds:
        return {}
    from torchgraft.plugin.registry import registry

    found = {}
    for text in kinds:
        pattern, equals, kind = text.rpartition("=")
        if not equals or not pattern:
            raise ConfigError(f"--kind {text!r}: write it like 'proj=Linear'")
        found[pattern] = registry().kind(kind).name
    return found


def parse_adapters(texts: tuple[str, ...]) -> dict[str | Path, float]:
    """("A", "B=0.5") → {"A": 1, "B": 0.5}. A directory whose name has a `=` in it is taken as it is.

    Raises:
        ConfigError: a factor is not a finite number, or one directory is given twice.
    """
    found: dict[str | Path, float] = {}
    for text in texts:
        name, equals, weight = text.rpartition("=")
        if not equals or Path(text).is_dir():
            name, weight = text, "1"
        try:
            factor = float(weight)
        except ValueError:
            factor = nan
        if not isfinite(factor):
            raise ConfigError(f"{text!r}: {weight!r} is not a number; write an adapter and its factor like path=0.5")
        if Path(name) in map(Path, found):
            raise ConfigError(f"{name}: it is given twice; give it once, with the sum of the factors")
        found[name] = factor
    return found


def parse_size(text: str) -> int:
    """ "5GB" → 5·10⁹, "512MiB" → 512·2²⁰.

    Raises:
        ConfigError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a size; write it like 5GB or 500MB")
    return size
