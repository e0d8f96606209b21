"""Strategies for files that are spoiled at any place: JSON documents, safetensors headers and names."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from torchgraft import dtypes

PREFIX = "base_model.model."
Q, FC1 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.fc1"
NAMES = [
    "",
    ".",
    "..",
    "../outside/model-2.safetensors",
    "/etc/passwd",
    "a\\b",
    "C:x",
    "\0",
    "model-2.safetensors",
    "x" * 300,
    "re:(",
    "q_proj",
]
NAMES += [
    "model-1.safetensors/",
    "./model-1.safetensors",
    "loop",
    "folder",
    "link",
    "*",
    "{",
    "@all",
    "Linear",
    "float32",
    "lora",
    "9" * 5000,
]
NAMES += ["\x1b[2J", "a\nb", f"{Q}\x1b[2J", r"(a|a)*\Z"]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**70),
    st.sampled_from([-1, 0, 1, 2, 1 << 31, 1 << 63, 1 << 64, 10**400, 1e308, -0.0, float("nan"), float("inf")]),
    st.sampled_from(NAMES),
    st.text(max_size=6),
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
nested = st.sampled_from([100, 2000, 100_000]).map(lambda depth: b"[" * depth + b"]" * depth)
places = st.floats(0, 1, exclude_max=True)
changes = st.lists(st.tuples(places, st.sampled_from(["set", "delete", "add"]), junk), min_size=1, max_size=3)
raw = st.one_of(
    st.binary(max_size=40), nested, st.sampled_from([b"", b"{", b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b'{"a":1,"a":2}', b"NaN"])
)
cases = st.one_of(changes, changes, changes, raw)


def _paths(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from _paths(item, (*path, key))


def spoiled(content: bytes, case: list[tuple[float, str, object]] | bytes) -> bytes:
    """The JSON in `content` with values replaced, removed or added somewhere in it; or other bytes altogether."""
    if isinstance(case, bytes):
        return case
    document = json.loads(content)
    for place, action, value in case:
        paths = list(_paths(document))
        if not paths:
            break
        path = paths[int(place * len(paths))]
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        if action == "delete":
            del holder[path[-1]]
        elif action == "add" and isinstance(holder, dict):
            holder[str(value)[:20]] = copy.deepcopy(value)
        else:
            holder[path[-1]] = copy.deepcopy(value)
    return json.dumps(document).encode()


layouts = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(dtypes.SIZES)), st.lists(st.integers(0, 5), max_size=4).map(tuple)),
    min_size=1,
    max_size=4,
)
lengths = st.sampled_from([0, 1, 7, 100_000_000, 100_000_001, 1 << 31, 1 << 62, (1 << 63) + 5, (1 << 64) - 1])
edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), places, st.integers(0, 7)),
        st.tuples(st.just("set"), places, st.sampled_from(list(b'"{}[]:,-0129.eE\\ \n\0tfn\xff\xc3'))),
        st.tuples(
            st.just("insert"), places, st.sampled_from([b"0", b"-", b'"', b",", b"{", b"}", b"[", b"]", b"e5", b".0", b"\\u0041", b" "])
        ),
        st.tuples(st.just("cut"), places, st.just(0)),
        st.tuples(st.just("append"), places, st.integers(1, 9)),
        st.tuples(st.just("length"), places, lengths),
        st.tuples(st.just("twice"), places, st.integers(1, 60)),
    ),
    min_size=1,
    max_size=3,
)


def edited(data: bytes, steps: list[tuple[str, float, Any]]) -> bytes:
    for action, place, value in steps:
        at = int(place * len(data))
        if action == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << value]) + data[at + 1 :]
        elif action == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif action == "insert":  # the length is corrected, so that the JSON is what is wrong
            length = int.from_bytes(data[:8], "little") + len(value)
            at = max(at, 8)
            data = (length % (1 << 64)).to_bytes(8, "little") + data[8:at] + value + data[at:]
        elif action == "cut":
            data = data[:at]
        elif action == "append":
            data += bytes(value)
        elif action == "length":
            data = value.to_bytes(8, "little") + data[8:]
        elif action == "twice":
            length = int.from_bytes(data[:8], "little") + value
            data = (length % (1 << 64)).to_bytes(8, "little") + data[8 : at + value] + data[at:]
    return data
