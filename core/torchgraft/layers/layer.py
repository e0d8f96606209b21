"""Describe a model as a list of layers, read from a module or from headers, for selection, plan and inspect."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torchgraft.layers.roles import role_of

BYPASSED = "is bypassed: {} reads its weight and does not call its forward, so an adapter would have no effect"
"""Reason for which a layer cannot be adapted; takes the owner of the layer."""
HEAD = "lm_head"
"""The output head of transformers' plain language models."""


@dataclass(unsafe_hash=True)  # not frozen, because that makes creation three times slower, and there can be 100,000 layers
class Layer:
    """One module that owns tensors. It can be adapted if it has a kind. Do not modify it: use `dataclasses.replace`."""

    name: str
    kind: str | None
    """Linear, Conv1D (transformers' transposed linear), Embedding, Conv1d, Conv2d, Conv3d, or a plugin's own."""
    shape: tuple[int, ...]
    """Shape of the weight as stored, or of the largest tensor if none is called weight."""
    dtype: str
    params: int
    """Number of entries in all tensors of the module itself."""
    bytes: int
    has_bias: bool = False
    """Whether one of its tensors is called bias."""
    groups: int = 1
    """Number of groups of a convolution."""
    aliases: tuple[str, ...] = ()
    """Further names of the same module."""
    tied: tuple[str, ...] = ()
    """Other layers whose weight is this same tensor."""
    weight_of: str = ""
    """Name of the tied layer whose stored weight this layer uses, if the files have none for it."""
    has_weight: bool = True
    """Whether one of its tensors is called weight."""
    is_open: bool = False
    """Whether its kind is unknown only because the files do not show the orientation."""
    reason: str = ""
    """Why it has no kind, where its shape would allow one."""

    @cached_property
    def role(self) -> str:
        return role_of(self.name, self.kind)

    @property
    def weight_name(self) -> str:
        """Name of the tensor that a checkpoint has for its weight."""
        return f"{self.weight_of or self.name}.weight"

    @property
    def tie_problem(self) -> str:
        """Why this layer and those tied to it cannot be stored with separate weights; empty if they can."""
        if not self.tied or (HEAD in (self.name, *self.tied) and len(self.tied) == 1):
            return ""
        return (
            f"{shares_weight(self.name, self.tied)} (config.json ties them), so merging would change both. "
            "Untie them first: save the model with tie_word_embeddings=False and a separate head"
        )

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def shares_weight(name: str, others: Iterable[str]) -> str:
    """Return the start of a message about tied weights."""
    return f"{name}: its weight is shared with {', '.join(others)}"


def outer_names(name: str) -> Iterator[str]:
    """Yield the name and those of its parents: "a.b.c" → "a.b.c", "a.b", "a"."""
    yield name
    while name := name.rpartition(".")[0]:
        yield name


def is_inside(name: str, modules: Container[str]) -> bool:
    """Whether `name` is one of `modules` or in one of them. Takes constant time if `modules` is a set."""
    return any(outer in modules for outer in outer_names(name))


def by_name(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Map every name, aliases included, to its layer."""
    return {name: layer for layer in layers for name in layer.names}


def parent_of(name: str) -> str:
    return name.rpartition(".")[0]
