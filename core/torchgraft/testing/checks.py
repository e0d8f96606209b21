"""What a check is, and the decorator that makes one of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from torchgraft.testing.cases import Case, Layers, Subject

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Check:
    """`function` is called with each layer in each of `dtypes`; it raises FailedError or SkippedError."""

    name: str
    function: Callable[[Case], None]
    dtypes: tuple[torch.dtype, ...]
    layers: Layers
    bias: bool | None
    """Only layers with one, or only those without."""
    first: bool
    """Whether the first layer of each kind is enough."""
    core: bool
    """Whether nothing is proven without it."""

    def cases(self, subject: Subject) -> Iterator[Case]:
        """Every layer that it is for. A quantised one has the dtype that it has."""
        for kind, examples in subject.examples:
            if self.layers == "all" or kind.quantized == (self.layers == "quantized"):
                for module, x in examples[:1] if self.first else examples:
                    if self.bias is None or self.bias == (getattr(module, "bias", None) is not None):
                        for dtype in (x.dtype,) if kind.quantized else self.dtypes:
                            yield Case(subject.name, subject.options, kind, module, x, dtype)

    @property
    def subjects(self) -> str:
        """What layers it is for, in words."""
        return " ".join(["a", *([] if self.layers == "all" else [self.layers]), "layer", *self._with_bias()])

    def _with_bias(self) -> list[str]:
        return [] if self.bias is None else ["with a bias" if self.bias else "without a bias"]


def check(
    *dtypes: torch.dtype, layers: Layers = "all", bias: bool | None = None, first: bool = False, core: bool = False
) -> Callable[[Callable[[Case], None]], Check]:
    """Make a check of a function. Its name is the function's, without a last "_"; its docstring says what it proves.

    Args:
        dtypes: of the layers; float32 if none is given.
        layers: all, or only those whose weight is dense or quantised.
        bias: only those with one, or only those without.
        first: one layer of each kind.
        core: without a check of this sort that passes, a report is not ok.
    """
    return lambda function: Check(function.__name__.rstrip("_"), function, dtypes or (torch.float32,), layers, bias, first, core)
