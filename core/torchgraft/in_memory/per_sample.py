"""Several adapters in one batch, each on the samples that name it.

The batch is sorted by adapter, so each adapter has one contiguous run of rows: the frozen layer runs once on all rows, and each
adapter once on its own. The overhead grows with the number of different adapters, not with the number of samples.
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

from torchgraft.errors import AttachError, near
from torchgraft.in_memory.adapter import adapters, check_switchable
from torchgraft.in_memory.graft import Grafted
from torchgraft.in_memory.parts import Part, TrainedCopy, named_parts


@contextmanager
def per_sample(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[None]:
    """Within the block, apply to each sample of a batch the adapter named for it, and no other.

        with tg.per_sample(model, ["german", "french", None, "german"]):
            model.generate(**batch_of_four)

    It ignores which adapters are active. The first dimension of every adapted layer's input must be the batch; an input of three or
    more dimensions may have a multiple of it, with the rows of a sample next to each other, as in a beam search. With activation
    checkpointing, run backward within the block too, because it repeats the forward. Attaching, detaching, merging and saving are
    refused within the block. Do not use it from several threads at once on one model.

    Args:
        adapter_names: one for each sample; None for the model without an adapter.

    Raises:
        AttachError: no name is given, or the model has no adapter of that name; in forward: a layer's input has another number of
            samples.
        MergeError: an adapter is merged, so the model without it is not available.
    """
    names, found = list(adapter_names), adapters(model)
    if not names:
        raise AttachError("adapter_names is empty; give one for each sample of the batch")
    for name in names:
        if name is not None and name not in found:
            raise AttachError(f"the model has no adapter {name!r}{near(name, found)}; it has {', '.join(found) or 'none'}")
    for adapter in found.values():
        check_switchable(adapter)
    routes = Routes.of(names)
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
    """The assignment of samples to adapters, in one module."""

    counts: Mapping[str | None, int]
    """Adapter → number of its samples, in the order of the runs."""
    order: Sequence[int]
    """Indices of the samples, sorted by run."""
    where: str = ""
    """Name of the module, for messages."""

    @classmethod
    def of(cls, names: Sequence[str | None]) -> Routes:
        counts = Counter(names)
        ranks = {name: rank for rank, name in enumerate(counts)}
        return cls(counts, sorted(range(len(names)), key=lambda sample: ranks[names[sample]]))

    def forward(self, layer: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of `module`, whose original forward is `layer`."""
        parts: dict[str | None, Part] = {name: part for name, part in named_parts(module).items() if name in self.counts}
        if not parts:
            return layer(*args, **kwargs)
        inputs = (*args, *kwargs.values())
        x = self._tensor(inputs[0] if len(inputs) == 1 else inputs, "take")
        repeats = self._repeats(x)
        order = self._rows(repeats, x.device)
        out = torch.cat(self._outputs(layer, parts, x if order is None else x[order], repeats))
        return out if order is None else out[order.argsort()]

    def _outputs(self, layer: Callable[..., Any], parts: Mapping[str | None, Part], x: Tensor, repeats: int) -> list[Tensor]:
        """Return the output of each run, for an input sorted by run."""
        runs = {name: repeats * count for name, count in self.counts.items()}
        inputs = dict(zip(runs, torch.split(x, list(runs.values())), strict=True))
        # A trained copy runs instead of the layer, so the layer must not see its samples: a BatchNorm would update its statistics.
        seen = [name for name in runs if not isinstance(parts.get(name), TrainedCopy)]
        outputs: dict[str | None, Tensor] = {}
        if seen:
            y = self._tensor(layer(x if len(seen) == len(runs) else torch.cat([inputs[name] for name in seen])), "return")
            outputs = dict(zip(seen, torch.split(y, [runs[name] for name in seen]), strict=True))
        for name, part in parts.items():
            outputs[name] = self._tensor(
                part.adapted(partial(_base_output, layer, inputs[name], outputs.get(name)), inputs[name]), "return"
            )
        return [outputs[name] for name in runs]

    def _tensor(self, value: Any, what: str) -> Tensor:
        if not isinstance(value, Tensor):
            raise AttachError(f"{self.where}: per_sample works on modules that {what} one tensor; this one does not")
        return value

    def _repeats(self, x: Tensor) -> int:
        """Return how many rows of `x` each sample has."""
        rows, samples = x.shape[0] if x.dim() else 0, len(self.order)
        if rows == samples or (x.dim() > 2 and rows and rows % samples == 0):
            return rows // samples
        raise AttachError(
            f"{self.where}: the first dimension of its input is {rows}, but adapter_names has {samples} entries; per_sample needs the "
            "batch in the first dimension"
        )

    def _rows(self, repeats: int, device: torch.device) -> Tensor | None:
        """Return the indices that sort the rows of a batch by run; None if they are sorted already."""
        if list(self.order) == sorted(self.order):
            return None
        return torch.tensor([sample * repeats + row for sample in self.order for row in range(repeats)], device=device)


def _base_output(layer: Callable[..., Any], x: Tensor, y: Tensor | None, requested: Tensor) -> Any:
    """Return the cached base output `y` if the method asks for exactly `x`; otherwise run the layer."""
    return y if requested is x else layer(requested)
