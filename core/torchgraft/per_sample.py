"""Several adapters in one batch, each on the samples that name it.

The batch is put in the order of its adapters, so that each has one run of rows: the frozen layer runs once for all of them, and
each adapter once for its own. What is added grows with the number of different adapters, not with that of samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.adapter import adapters
from torchgraft.errors import AttachError, MergeError
from torchgraft.graft import Grafted, named_parts
from torchgraft.selection import near


@contextmanager
def per_sample(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[None]:
    """Within the block each sample of a batch goes through the adapter that is named for it, and through no other.

        with tg.per_sample(model, ["german", "french", None, "german"]):
            model.generate(**batch_of_four)

    Which adapters are active makes no difference there. Every adapted layer must be given the batch in its first dimension; one
    of three dimensions or more may have a multiple of it, with the rows of a sample side by side, as in a beam search. Backward
    passes that compute again what was checkpointed belong in the block; attaching, detaching, merging and saving do not. Not for
    several threads at once on one model.

    Args:
        adapter_names: one for each sample; None for the model without an adapter.

    Raises:
        AttachError: the model has no adapter of that name; in forward: a layer's input has another number of samples.
        MergeError: an adapter is merged, so that the model without it is not at hand.
    """
    found = adapters(model)
    for name in adapter_names:
        if name is not None and name not in found:
            raise AttachError(f"the model has no adapter {name!r}{near(name, found)}; it has {', '.join(found) or 'none'}")
    for adapter in found.values():
        adapter.check_switchable()
    routes = Routes.of(adapter_names)
    grafted = {name: module for name, module in model.named_modules() if isinstance(module, Grafted)}
    before = {name: module._graft_routes for name, module in grafted.items()}
    try:
        for name, module in grafted.items():
            module._graft_routes = replace(routes, where=name)
        yield
    finally:
        for name, module in grafted.items():
            if before[name] is None:
                module.__dict__.pop("_graft_routes", None)
            else:
                module._graft_routes = before[name]


@dataclass(frozen=True)
class Routes:
    """Which samples go through which adapter, in one module."""

    counts: Mapping[str | None, int]
    """Adapter → the number of its samples, in the order of the runs."""
    order: Sequence[int]
    """The samples, run after run."""
    where: str = ""
    """The module's name."""

    @classmethod
    def of(cls, names: Sequence[str | None]) -> Routes:
        counts = Counter(names)
        ranks = {name: rank for rank, name in enumerate(counts)}
        return cls(counts, sorted(range(len(names)), key=lambda sample: ranks[names[sample]]))

    def forward(self, layer: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of `module`, whose own forward is `layer`."""
        parts = {name: part for name, part in named_parts(module).items() if name in self.counts}
        if any(part.undo is not None for part in named_parts(module).values()):
            raise MergeError(f"{self.where}: an adapter was merged within per_sample; the layer without it is not at hand; unmerge it")
        if not parts:
            return layer(*args, **kwargs)
        x = self._input(*args, **kwargs)
        repeats = self._repeats(x)
        order = self._rows(repeats, x.device)
        x = x if order is None else x[order]
        y = layer(x)
        runs = [repeats * count for count in self.counts.values()]
        out = torch.cat(
            [
                own_y if name not in parts else parts[name].adapted(partial(_known, layer, own_x, own_y), own_x)
                for name, own_x, own_y in zip(self.counts, torch.split(x, runs), torch.split(y, runs), strict=True)
            ]
        )
        return out if order is None else out[order.argsort()]

    def _input(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise AttachError(f"{self.where}: per_sample works on modules that take one tensor, and this one takes another input")
        return inputs[0]

    def _repeats(self, x: Tensor) -> int:
        """How many rows of `x` there are for each sample."""
        rows, samples = x.shape[0] if x.dim() else 0, len(self.order)
        if rows == samples or (x.dim() > 2 and rows and rows % samples == 0):
            return rows // samples
        raise AttachError(
            f"{self.where}: its input has {rows} in the first dimension, where adapter_names has {samples}; per_sample works on layers "
            "that are given the batch there"
        )

    def _rows(self, repeats: int, device: torch.device) -> Tensor | None:
        """The rows of a batch, run after run; None if that is how they are."""
        if list(self.order) == sorted(self.order):
            return None
        return torch.tensor([sample * repeats + row for sample in self.order for row in range(repeats)], device=device)


def _known(layer: Callable[..., Any], x: Tensor, y: Tensor, asked: Tensor) -> Any:
    """`layer(asked)`, where `layer(x)` is known to be `y`."""
    return y if asked is x else layer(asked)
