"""A list of layers as a tree whose repeated blocks are folded: encoder.layer.0-5 ×6."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torchgraft.layers.layer import Layer


class Row(NamedTuple):
    depth: int
    label: str
    times: int
    """Number of equal modules that this row represents."""
    layer: Layer | None
    params: int
    bytes: int
    trained: int
    """Parameters that an adapter trains in this row."""


@dataclass(slots=True)
class Node:
    layer: Layer | None = None
    children: dict[str, Node] = field(default_factory=dict)
    params: int = 0
    bytes: int = 0
    trained: int = 0
    shape: int = 0
    """A number that is equal for nodes with equal contents, whatever their names."""


def rows(layers: Iterable[Layer], trained: Mapping[str, int], depth: int | None = None) -> list[Row]:
    """Return the rows of the folded tree, down to `depth` levels. `trained`: layer → parameters that an adapter trains there."""
    root = Node()
    for layer in layers:
        node = root
        for segment in layer.name.split(".") if layer.name else []:
            child = node.children.get(segment)
            if child is None:
                child = node.children[segment] = Node()
            node = child
        node.layer = layer
    _measure(root, trained, {})
    found = list(_walk(root, 0, depth))
    if root.layer is not None:
        found.insert(0, Row(0, "(model)", 1, root.layer, root.layer.params, root.layer.bytes, trained.get("", 0)))
    return found


def _measure(node: Node, trained: Mapping[str, int], shapes: dict[object, int]) -> None:
    own, look = node.layer, None
    if own is not None:
        node.params, node.bytes, node.trained = own.params, own.bytes, trained.get(own.name, 0)
        look = (own.kind, own.shape, own.dtype, own.params, node.trained)
    for child in node.children.values():
        _measure(child, trained, shapes)
        node.params += child.params
        node.bytes += child.bytes
        node.trained += child.trained
    key = (look, *sorted([(name, child.shape) for name, child in node.children.items()])) if node.children else look
    node.shape = shapes.setdefault(key, len(shapes))


def _walk(node: Node, level: int, depth: int | None) -> Iterator[Row]:
    for label, members in _groups(node):
        first = members[0]
        while first.layer is None and len(groups := _groups(first)) == 1 and len(members) == 1:
            (inner, members) = groups[0]  # a container of one child is one row with it
            label, first = f"{label}.{inner}", members[0]
        times = len(members)
        yield Row(level, label, times, first.layer, first.params * times, first.bytes * times, first.trained * times)
        if first.children and (depth is None or level + 1 < depth):
            yield from _walk(first, level + 1, depth)


def _groups(node: Node) -> list[tuple[str, list[Node]]]:
    """Return the children, with runs of equal numbered ones in one group."""
    groups: list[tuple[list[str], list[Node]]] = []
    children = list(node.children.items())
    if all(map(_is_number, node.children)):  # shards may hold blocks in any order
        children.sort(key=lambda item: int(item[0]))
    for name, child in children:
        if groups and _continues(groups[-1][0][-1], name) and groups[-1][1][-1].shape == child.shape:
            groups[-1][0].append(name)
            groups[-1][1].append(child)
        else:
            groups.append(([name], [child]))
    return [(names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}", members) for names, members in groups]


def _continues(before: str, name: str) -> bool:
    return _is_number(before) and _is_number(name) and int(name) == int(before) + 1


def _is_number(name: str) -> bool:
    return name.isdecimal() and len(name) < 10  # Python refuses to read thousands of digits
