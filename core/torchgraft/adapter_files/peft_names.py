"""Names in PEFT's files: tensors, targeted modules, and patterns for single modules."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from torchgraft.errors import PairingError
from torchgraft.layers.layer import Layer, is_inside
from torchgraft.layers.roles import LINEAR_KINDS
from torchgraft.patterns import match

PREFIX = "base_model.model."


def prefix(peft: object) -> str:
    """Return the prefix of tensor names: PREFIX if the adapter has a PEFT layout or config (`peft`), else ""."""
    return PREFIX if peft else ""


WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Segments that DDP, torch.compile, FSDP and activation checkpointing put into the names of modules."""
ADAPTER_NAME = re.compile(
    r"\.(?:(lora_[AB])\.(?!weight$)[^.]+(?=\.weight$)|(lora_embedding_[AB]|lora_magnitude_vector)\.[^.]+(?:\.weight)?$)"
)
"""A LoRA tensor with the adapter's name in its own, as in the state dict of a PeftModel."""


def unwrapped(name: str) -> str:
    """Return a tensor's name as PEFT's save_pretrained writes it, without the segments of wrappers and the adapter's name."""
    bare = ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)
    bare = ADAPTER_NAME.sub(lambda found: f".{found[1] or found[2]}", bare)
    return bare if bare.startswith(PREFIX) else PREFIX + bare


def targets(sites: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """Return `target_modules` that match the sites and no other module: last segments, else whole names, else a regex."""
    names, wanted = list(modules), set(sites)
    for candidates in (sorted({name.rpartition(".")[2] for name in sites}), sorted(sites)):
        if {name for name in names if _is_suffix(name, candidates)} <= wanted:
            return candidates
    return "|".join(re.escape(name) for name in sorted(sites))


def patterns(values: Mapping[str, Any], sites: Sequence[str]) -> dict[str, Any]:
    """Return a `rank_pattern` or `alpha_pattern` for the sites in `values`, whose keys match one site each in any order.

    PEFT takes the first key with re.match(r"(.*\\.)?(key)$", site), and saves the keys sorted.
    """
    found, ends, alike = {}, Counter[str](), defaultdict[tuple[int, int], list[str]](list)
    for site in sites:
        for end in accumulate(reversed(site.split(".")), lambda end, segment: f"{segment}.{end}"):
            ends[end] += 1
            alike[len(end), end.count(".")].append(end)

    def is_clear(name: str) -> bool:
        """Whether `name`, read as a regular expression, matches this site alone: its dots match any character."""
        others = (end for dots in range(name.count(".")) for end in alike.get((len(name), dots), ()))
        return bool(re.fullmatch(r"[\w.]+", name)) and ends[name] == 1 and not any(re.fullmatch(name, end) for end in others)

    for name, value in values.items():
        anchored = f"^{re.escape(name)}"
        found[name if is_clear(name) else anchored if anchored not in sites else f"^(?:{re.escape(name)})"] = value
    return found


def pattern_value(pattern: Mapping[str, Any], site: str, default: Any) -> Any:
    """Return the value that PEFT takes for `site` from a `rank_pattern` or `alpha_pattern`.

    Raises:
        PairingError: a key is not a regular expression.
    """
    for key, value in pattern.items():
        if _match(key, site, (r"(.*\.)?(", ")$")):
            return value
    return pattern.get(site, default)


def is_target(peft: Mapping[str, Any], layer: Layer) -> bool:
    """Whether PEFT would put an adapter on `layer`.

    Raises:
        PairingError: the config's regular expression is malformed.
    """
    if _named(peft.get("exclude_modules"), layer.name) or in_saved_module(peft, layer.name):
        return False
    wanted = peft.get("target_modules") or []
    if wanted == "all-linear":
        return layer.kind in LINEAR_KINDS and layer.role != "head"
    if isinstance(wanted, str):
        return _named(wanted, layer.name)
    return layer.name in wanted or (_named(wanted, layer.name) and _in_blocks(peft, layer.name))


def saved_modules(wanted: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Return the outermost modules that PEFT trains fully for `modules_to_save`: it compares the ends of names, not whole segments."""
    found = {name for name in modules if name.endswith(tuple(wanted))} if wanted else set()
    return sorted(name for name in found if not is_inside(name.rpartition(".")[0], found))


def in_saved_module(peft: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT does not target `name` because it is in a fully trained module; PEFT reads the names as regular expressions."""
    return any(_match(saved, name, around) for saved, around in _saved(tuple(peft.get("modules_to_save") or ())))


@lru_cache(maxsize=8)
def _saved(wanted: tuple[str, ...]) -> list[tuple[str, tuple[str, str]]]:
    """Return (expression, what stands around it) for `modules_to_save`. Plain names, possibly hundreds, share one expression."""
    before, after = r"(^|.*\.)", r"($|\..*)"
    plain = [saved for saved in wanted if re.fullmatch(r"[\w.]+", saved)]
    joined = [("|".join(plain), (f"{before}(?:", f"){after}"))] if plain else []
    return [*joined, *((saved, (before, after)) for saved in wanted if saved not in plain)]


def _named(wanted: Any, name: str) -> bool:
    if not wanted:
        return False
    if not isinstance(wanted, str):
        return _is_suffix(name, wanted)
    return _match(wanted, name) is not None


def _match(expression: str, name: str, around: tuple[str, str] | None = None) -> Any:
    """Match an expression of adapter_config.json with a name.

    Raises:
        PairingError: the expression is invalid, or takes too long.
    """
    try:
        return match(expression, name, around=around)
    except PairingError as error:
        raise PairingError(f"adapter_config.json: {error}") from None


def _is_suffix(name: str, candidates: Iterable[str]) -> bool:
    return any(name == candidate or name.endswith(f".{candidate}") for candidate in candidates)


def _in_blocks(peft: Mapping[str, Any], name: str) -> bool:
    blocks = peft.get("layers_to_transform")
    if blocks is None or blocks == []:
        return True
    wanted = [blocks] if isinstance(blocks, int) else list(blocks)
    containers = peft.get("layers_pattern") or []
    containers = [containers] if isinstance(containers, str) else containers
    forms = [(container, (r"(?:^|.*?\.)", r"\.(\d+)\.")) for container in containers] or [("", (r".*?\.[^.]*", r"\.(\d+)\."))]
    first = next((found for form in forms if (found := _match(form[0], name, form[1]))), None)
    number = first[1] if first is not None else None
    return number is not None and number.isdecimal() and int(number) in wanted
