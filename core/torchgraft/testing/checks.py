"""The class `Check`, and the decorator that turns a function into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from torchgraft.testing.cases import Case, Layers, Subject

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Check:
    """One check. `function` is called with each layer in each of `dtypes`; it raises FailedError or SkippedError."""

    name: str
    function: Callable[[Case], None]
    dtypes: tuple[torch.dtype, ...]
    layers: Layers
    bias: bool | None
    """True: only layers with a bias. False: only layers without. None: all layers."""
    first: bool
    """Whether to run on the first example layer of each kind only."""
    core: bool
    """Whether a report is only ok if a check with this flag passed."""

    def cases(self, subject: Subject) -> Iterator[Case]:
        """Yield every layer that the check applies to, in every dtype. A quantized layer has only one dtype."""
        for kind, examples in subject.examples:
            if self.layers == "all" or kind.quantized == (self.layers == "quantized"):
                for module, x in examples[:1] if self.first else examples:
                    if self.bias is None or self.bias == (getattr(module, "bias", None) is not None):
                        for dtype in (x.dtype,) if kind.quantized else self.dtypes:
                            yield Case(subject.name, subject.options, kind, module, x, dtype)

    @property
    def subjects(self) -> str:
        """Description of the layers that the check applies to: "a dense layer with a bias"."""
        return " ".join(["a", *([] if self.layers == "all" else [self.layers]), "layer", *self._with_bias()])

    def _with_bias(self) -> list[str]:
        return [] if self.bias is None else ["with a bias" if self.bias else "without a bias"]


def check(
    *dtypes: torch.dtype, layers: Layers = "all", bias: bool | None = None, first: bool = False, core: bool = False
) -> Callable[[Callable[[Case], None]], Check]:
    """Turn a function into a check. The check's name is the function's without a trailing "_"; the docstring describes what is checked.

    Args:
        dtypes: dtypes of the layers; float32 if none is given.
        layers: all layers, or only those whose weight is dense or quantized.
        bias: only layers with a bias (True), or only those without (False).
        first: only the first example layer of each kind.
        core: a report is only ok if at least one core check passed.
    """
    return lambda function: Check(function.__name__.rstrip("_"), function, dtypes or (torch.float32,), layers, bias, first, core)
