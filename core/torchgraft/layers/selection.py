"""Select layers by a list of patterns.

=====================  =================================================================================
`*.{q,v}_proj`         glob on the whole dotted name: `*` crosses dots, `?` and `[…]` take one character,
                       braces expand
`q_proj`               a bare name is a suffix on whole segments: `q_proj`, `h.0.attn.q_proj`
`re:.*\\.\\d+\\.fc1`      a regular expression on the whole name
`@attention`           a role: @attention @mlp @linear @embedding @conv @head @all
`!lm_head`             a leading `!` excludes
=====================  =================================================================================

A list is a union, and excludes win. `blocks="0-15,20"` keeps the layers of those blocks; a layer's block is the first
number in its name. Every pattern and every block must match something, or the call is an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torchgraft.errors import SelectionError, near
from torchgraft.layers import roles
from torchgraft.layers.layer import Layer

MAX_NAMES = 10_000
MAX_BRACES = 100
"""A pattern that expands to more names, or has more braces, is a mistake or an attack."""


@dataclass(frozen=True)
class Pattern:
    """One compiled pattern."""

    text: str
    exclude: bool
    matches: Callable[[Layer], bool]


@dataclass(frozen=True)
class Selection:
    """The selected layers."""

    layers: tuple[Layer, ...]
    counts: dict[str, int]
    """Pattern as written → number of layers that it matches by itself."""


def select(
    layers: Sequence[Layer],
    targets: Iterable[str],
    blocks: str | int | Iterable[int] | None = None,
    *,
    allow_unmatched: bool = False,
) -> Selection:
    """Return the layers of a known kind that `targets` name, in the model's order.

    Raises:
        SelectionError: a pattern is malformed; or, unless `allow_unmatched`, a pattern or a block matches nothing.
    """
    patterns = [parse(text) for text in targets]
    sites = [layer for layer in layers if layer.kind is not None]
    candidates = _in_blocks(sites, blocks, allow_unmatched)
    unclear = _in_blocks([replace(layer, kind="Linear") for layer in layers if layer.is_open and layer.kind is None], blocks, True)
    hits = {p.text: {layer.name for layer in candidates + unclear * p.exclude if p.matches(layer)} for p in patterns}
    if not allow_unmatched:
        for pattern in patterns:
            if not hits[pattern.text]:
                raise SelectionError(_nothing_matches(pattern, layers, sites, blocks))
    included = set[str]().union(*(hits[p.text] for p in patterns if not p.exclude))
    excluded = set[str]().union(*(hits[p.text] for p in patterns if p.exclude))
    wanted = included - excluded
    if not allow_unmatched and not wanted:
        raise SelectionError(_all_excluded(patterns))
    if not allow_unmatched:
        _refuse_unclear(unclear, patterns)
    chosen = tuple(layer for layer in candidates if layer.name in wanted)
    return Selection(chosen, {text: len(names) for text, names in hits.items()})


def _refuse_unclear(unclear: list[Layer], patterns: list[Pattern]) -> None:
    """Refuse to skip a layer of unknown kind silently.

    Raises:
        SelectionError: a layer would be selected if the files showed that it is a Linear.
    """
    for layer in unclear:
        hits = [pattern.exclude for pattern in patterns if pattern.matches(layer)]
        if hits and not any(hits):
            raise SelectionError(f"{layer.name} {layer.reason}; or exclude it: '!{layer.name}'")


def parse(text: str) -> Pattern:
    """Compile one pattern.

    Raises:
        SelectionError: it is empty, its braces or its regular expression are malformed, or the role is unknown.
    """
    exclude = text.startswith("!")
    body = text.removeprefix("!")
    if not body:
        raise SelectionError(f"the pattern {text!r} is empty; write a name, a glob, re:… or a @role")
    if body.startswith("@"):
        return Pattern(text, exclude, _role(body))
    expression = _compile(body)
    return Pattern(text, exclude, lambda layer: any(expression.fullmatch(name) for name in layer.names))


def name_matcher(text: str) -> Callable[[str], bool]:
    """Compile a pattern for names of modules: a name, a glob or re:…, without roles and `!`."""
    if text.startswith(("@", "!")) or not text:
        raise SelectionError(f"{text!r}: a module's name, a glob or re:… is needed here")
    expression = _compile(text)
    return lambda name: expression.fullmatch(name) is not None


MAX_DIGITS = 9
"""Largest number of digits of a block's number, because Python refuses to parse thousands of them."""


def block_of(name: str) -> int | None:
    """Return the first number among the segments: layers.3.mlp.experts.5.w1 is in block 3."""
    number = next((segment for segment in name.split(".") if segment.isdecimal()), None)
    return None if number is None or len(number) > MAX_DIGITS else int(number)


def _role(body: str) -> Callable[[Layer], bool]:
    if body not in roles.PATTERNS:
        raise SelectionError(f"{body!r} is not a role; the roles are {' '.join(roles.PATTERNS)}")
    return lambda layer: roles.matches(body, layer.role, layer.kind)


def _compile(body: str) -> re.Pattern[str]:
    is_regex = body.startswith("re:")
    expression = body[3:] if is_regex else "|".join(_regex_of_glob(word) for word in expand_braces(body))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # for sets like [[a], which later versions of Python may read differently
            return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise SelectionError(f"{body[:60]!r} is not a {'regular expression' if is_regex else 'glob'}: {error}") from None


def _regex_of_glob(word: str) -> str:
    if not re.search(r"[*?\[]", word):
        return rf"(?:.*\.)?{re.escape(word)}"
    pieces = re.split(r"(\*|\?|\[!?[^\]]+\])", word)
    return "".join(_regex_of_piece(piece) for piece in pieces)


def _regex_of_piece(piece: str) -> str:
    if piece == "*":
        return ".*"
    if piece == "?":
        return "."
    if len(piece) > 2 and piece.startswith("[") and piece.endswith("]"):
        negated = "^" if piece[1] == "!" else ""
        members = re.sub(r"([\\^\[&~|])", r"\\\1", piece[1 + len(negated) : -1])
        return f"[{negated}{members}]"
    return re.escape(piece)


def expand_braces(text: str) -> list[str]:
    """Expand braces: "a.{b,c{d,e}}" → ["a.b", "a.cd", "a.ce"].

    Raises:
        SelectionError: a brace is not closed or not opened, or there are too many.
    """
    if text.count("{") > MAX_BRACES:
        raise SelectionError(f"the pattern {text[:60]!r}… has more than {MAX_BRACES} braces")
    opening = text.find("{")
    if "}" in (text[:opening] if opening >= 0 else text):
        raise SelectionError(f"the braces in {text!r} do not pair")
    if opening < 0:
        return [text]
    options, rest = _split_braces(text, opening)
    head, tails = text[:opening], expand_braces(rest)
    heads = [head + inner for option in options for inner in expand_braces(option)]
    if len(heads) * len(tails) > MAX_NAMES:
        raise SelectionError(f"the braces in {text[:60]!r} expand to more than {MAX_NAMES:,} names")
    return [first + tail for first in heads for tail in tails]


def _split_braces(text: str, opening: int) -> tuple[list[str], str]:
    """Return the comma-separated options of the brace at `opening`, and the text after it."""
    depth, start, options = 0, opening + 1, []
    for position in range(opening, len(text)):
        character = text[position]
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0 or (depth == 1 and character == ","):
            options.append(text[start:position])
            start = position + 1
        if depth == 0:
            return options, text[start:]
    raise SelectionError(f"the braces in {text!r} do not pair")


def _in_blocks(sites: list[Layer], blocks: str | int | Iterable[int] | None, allow_unmatched: bool) -> list[Layer]:
    if blocks is None:
        return sites
    ranges = parse_blocks(blocks)
    blocks_of = {layer.name: {block for name in layer.names if (block := block_of(name)) is not None} for layer in sites}
    present = set[int]().union(*blocks_of.values())
    if not allow_unmatched:
        for span in ranges:
            missing = next((block for block in span if block not in present), None)
            if missing is not None:
                known = f"its blocks are {min(present)} to {max(present)}" if present else "no layer's name has a number"
                raise SelectionError(f"layers: the model has no block {missing}; {known}")
    return [layer for layer in sites if any(block in span for span in ranges for block in blocks_of[layer.name])]


def parse_blocks(blocks: str | int | Iterable[int]) -> list[range]:
    """Parse block ranges: "0-15,20" → [range(0, 16), range(20, 21)]."""
    if isinstance(blocks, int):
        blocks = [blocks]
    if not isinstance(blocks, str):
        return [range(block, block + 1) for block in blocks]
    ranges = []
    for part in blocks.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise SelectionError(f"layers={blocks!r}: {part.strip()!r} is not a block or a range; write it like 0-15,20")
        ranges.append(range(first, last + 1))
    return ranges


def _nothing_matches(pattern: Pattern, layers: Sequence[Layer], sites: list[Layer], blocks: object) -> str:
    body = pattern.text.removeprefix("!")
    start = f"the pattern {pattern.text!r} matches no layer"
    unfit = next((layer for layer in layers if layer.kind is None and pattern.matches(layer)), None)
    if unfit is not None:
        return f"{start} that can be adapted: {unfit.name} {unfit.reason or f'is a {unfit.role} layer of shape {list(unfit.shape)}'}"
    if not sites:
        return f"{start}: nothing in this model can be adapted"
    if blocks is not None and any(pattern.matches(layer) for layer in sites):
        return f"{start} in blocks {blocks}, but does in others"
    if body.startswith("@"):
        return f"{start}; the roles here are {', '.join('@' + role for role in sorted({layer.role for layer in sites}))}"
    if (container := _container(body, sites)) is not None:
        return f"{start}: it names a container; write '{container}' for what is in it"
    return start + _near_pattern(body, sites)


def _container(body: str, sites: list[Layer]) -> str | None:
    """Return a pattern for the layers inside the module that `body` names, or None."""
    if body.startswith("re:"):
        return None
    expression = _compile(body)
    names = [name.split(".") for layer in sites for name in layer.names]
    parents = {".".join(segments[:end]) for segments in names for end in range(1, len(segments))}
    hits = {parent for parent in parents if expression.fullmatch(parent)}
    if not hits:
        return None
    return f"{body}.*" if body in hits or re.search(r"[*?\[]", body) else f"*.{body}.*"


def _near_pattern(body: str, sites: list[Layer]) -> str:
    names = [name for layer in sites for name in layer.names]
    leaves = [name.rpartition(".")[2] for name in names]
    query = re.sub(r"[*?\[\]{}\\^$()]", "", body.removeprefix("re:")).strip(".")
    last = query.rpartition(".")[2]
    found = (near(query, names) if "." in query else "") or near(last, leaves)
    return found or f"; names here: {', '.join(sorted(set(leaves))[:6])}"


def _all_excluded(patterns: list[Pattern]) -> str:
    if all(pattern.exclude for pattern in patterns):
        return "nothing is selected: there are only excludes; add what to take, for example @linear"
    return f"nothing is left: {', '.join(p.text for p in patterns if p.exclude)} excludes all that the other patterns match"
