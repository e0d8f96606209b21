"""Find the names under which an adapter's tensors are in a base.

An adapter has the names that the modules had in training. A model with a head prefixes the names of the bare model
(`layers.0…` becomes `model.layers.0…`), and transformers renames between files and memory. If the adapter's names
exist in the base, they are used. Otherwise prefixes are inferred from the names themselves, not from a list.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torchgraft.layers.layer import parent_of


@dataclass(frozen=True)
class Naming:
    """One way to name the base's tensors. Tensors without a name in it cannot match the adapter."""

    tensors: Mapping[str, str]
    """Name in this naming → the base's own name."""

    @cached_property
    def modules(self) -> dict[str, str]:
        """The names of modules → the base's own. If a module's tensors map to different modules, the one that owns `.weight` wins."""
        names: dict[str, str] = {}
        for name, own in self.tensors.items():
            if own.endswith(".weight") or parent_of(own) not in names:
                names[parent_of(own)] = parent_of(name)
        return {name: own for own, name in names.items()}

    def prefixed(self, adapters: Iterable[str]) -> Iterator[Naming]:
        """Yield this naming with a prefix removed or added, for each prefix that finds a layer for one of the adapter's tensors.

        A tensor keeps its name if the adapter has names with the same first segment that the prefix does not explain (a head).
        """
        names = list(adapters)
        heads = {name.partition(".")[0] for name in names}
        for prefix, is_added in _prefixes(names, self):
            change = _adding(prefix) if is_added else _removing(prefix)
            changed = {name: new for name in self.tensors if (new := change(name))}
            explained = {new.partition(".")[0] for new in changed.values()}
            renamed = {}
            for name, own in self.tensors.items():
                if name.partition(".")[0] in heads - explained:
                    renamed[name] = own
                elif name in changed:
                    renamed[changed[name]] = own
            yield Naming(renamed)

    def module(self, name: str) -> str:
        """Return the base's module that has the tensors of `name`, under the same names inside it; or ""."""
        inside = {tensor.removeprefix(name): own for tensor, own in self.tensors.items() if tensor.startswith(f"{name}.")}
        found = {own.removesuffix(tail) for tail, own in inside.items() if own.endswith(tail)}
        fits = len(found) == 1 and all(own.endswith(tail) for tail, own in inside.items())
        return found.pop() if fits else ""


def own_names(tensors: Iterable[str]) -> Naming:
    return Naming({name: name for name in tensors})


def owner_of(tensor: str, modules: Container[str]) -> str:
    """Return the longest module name that is a prefix of the tensor's name, or ""."""
    segments = tensor.split(".")
    names = (".".join(segments[:end]) for end in range(len(segments) - 1, 0, -1))
    return next((name for name in names if name in modules), "")


def described(renamed: Mapping[str, str]) -> str:
    """Describe `renamed` (adapter's name → base's name) in one line; "" if it is empty."""
    changes: dict[tuple[str, str], list[str]] = {}
    for name, own in renamed.items():
        here, there, tail = _without_common_tail(name, own)
        changes.setdefault((here, there), []).append(tail)
    if not changes:
        return ""
    if len(changes) == 1 and not all(next(iter(changes))):
        (here, there), tails = next(iter(changes.items()))
        first = sorted({tail.partition(".")[0] for tail in tails})
        return f"the adapter's {_listed(here, first)} are {_listed(there, first)} here"
    name, own = next(iter(renamed.items()))
    more = f", and {len(renamed) - 1} more have other names" if len(renamed) > 1 else ""
    return f"the adapter's {name} is {own} here{more}"


def _listed(prefix: str, first: Iterable[str]) -> str:
    return ", ".join(f"{prefix}.{segment}.*" if prefix else f"{segment}.*" for segment in first)


def _without_common_tail(one: str, other: str) -> tuple[str, str, str]:
    first, second, tail = one.split("."), other.split("."), list[str]()
    while first and second and first[-1] == second[-1]:
        tail.insert(0, first.pop())
        second.pop()
    return ".".join(first), ".".join(second), ".".join(tail)


def _adding(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def _removing(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix) if name.startswith(prefix) else ""


def _prefixes(adapters: Iterable[str], naming: Naming) -> dict[tuple[str, bool], None]:
    """Return (prefix, whether only the adapter's names have it) candidates, from one unknown name per first segment.

    Prefixes with a number are dropped, because they would match one block or expert with another.
    """
    unknown: dict[str, str] = {}
    for name in adapters:
        if name not in naming.tensors and not owner_of(name, naming.modules):
            unknown.setdefault(name.partition(".")[0], name)
    found: dict[tuple[str, bool], None] = {}
    for name in unknown.values():
        segments = name.split(".")
        for end in range(len(segments) - 1, 0, -1):
            module = "." + ".".join(segments[:end])
            longer = [own.removesuffix(module) + "." for own in naming.modules if own.endswith(module)]
            found.update(((prefix, False), None) for prefix in longer)
            if longer:
                break
        for start in range(1, len(segments) - 1):
            if owner_of(".".join(segments[start:]), naming.modules):
                found[".".join(segments[:start]) + ".", True] = None
    return {key: None for key in found if not any(segment.isdecimal() for segment in key[0].split("."))}
