"""A model as a list of layers. Selection, plan and inspect work on it, whether it came from a module or from headers."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torchgraft.layers.roles import role_of

HEAD = "lm_head"
"""The output head of transformers' plain language models."""


@dataclass(unsafe_hash=True)  # frozen in spirit: a frozen one takes three times as long to make, and there can be 100,000
class Layer:
    """One module that owns tensors. It can be adapted if it has a kind. Not to be changed: `dataclasses.replace` makes another."""

    name: str
    kind: str | None
    """Linear, Conv1D (transformers' transposed linear), Embedding, Conv1d, Conv2d, Conv3d, or a plugin's own."""
    shape: tuple[int, ...]
    """Of the weight as it is stored; of the largest tensor where none is called weight."""
    dtype: str
    params: int
    """Elements in all the module's own tensors."""
    bytes: int
    has_bias: bool = False
    """Whether one of its tensors is called bias."""
    groups: int = 1
    """Of a grouped convolution."""
    aliases: tuple[str, ...] = ()
    """Further names of the same module."""
    tied: tuple[str, ...] = ()
    """Other layers whose weight is this same tensor."""
    weight_of: str = ""
    """The layer whose weight in the files is this one's: a tied head need have none there."""
    has_weight: bool = True
    """Whether one of its tensors is called weight."""
    is_open: bool = False
    """Whether it could have a kind, and only the files do not tell which."""
    reason: str = ""
    """Why it has no kind, where its shape would allow one."""

    @cached_property
    def role(self) -> str:
        return role_of(self.name, self.kind)

    @property
    def weight_name(self) -> str:
        """Of the tensor that a checkpoint has for its weight."""
        return f"{self.weight_of or self.name}.weight"

    @property
    def tie_problem(self) -> str:
        """Why files cannot give it and the layers that it is tied to a weight each; empty if they can."""
        if not self.tied or (HEAD in (self.name, *self.tied) and len(self.tied) == 1):
            return ""
        return (
            f"{shares_weight(self.name, self.tied)} (config.json ties them), so merging would change both. "
            "Untie them first: save the model with tie_word_embeddings=False and a head of its own"
        )

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def shares_weight(name: str, others: Iterable[str]) -> str:
    """Return the start of a message about tied weights."""
    return f"{name}: its weight is also that of {', '.join(others)}"


def outer_names(name: str) -> Iterator[str]:
    """ "a.b.c" → "a.b.c", "a.b", "a"."""
    yield name
    while name := name.rpartition(".")[0]:
        yield name


def is_inside(name: str, modules: Container[str]) -> bool:
    """Whether `name` is one of `modules` or in one of them. Of a set it takes as long however many there are."""
    return any(outer in modules for outer in outer_names(name))


def by_name(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Every name of every layer, aliases included."""
    return {name: layer for layer in layers for name in layer.names}


def parent_of(name: str) -> str:
    return name.rpartition(".")[0]
