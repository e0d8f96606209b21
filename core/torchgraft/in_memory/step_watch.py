"""Warn if a method that needs `Adapter.step` is trained without it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from torchgraft.errors import TorchgraftWarning


class StepWatch:
    """Counts an adapter's backward passes until its `step` is called."""

    def __init__(self) -> None:
        self.stepped = False
        """Whether `Adapter.step` was called."""
        self._backwards = 0

    def count_backwards(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count the backward passes that reach the first trained parameter."""
        first = next((parameter for parameter in parameters if parameter.requires_grad), None)
        if first is not None:
            first.register_post_accumulate_grad_hook(self._count)  # type: ignore[no-untyped-call]

    def _count(self, parameter: Tensor) -> None:
        self._backwards += 1

    def check(self, adapter: str, method: str) -> None:
        """Warn if the adapter was trained and `Adapter.step` was never called.

        The warning points at the caller of the method that calls this one.
        """
        if self._backwards and not self.stepped:
            warnings.warn(
                f"the adapter {adapter!r} was trained for {self._backwards} backward passes and adapter.step(optimizer, step=…) was "
                f"never called, so {method} did nothing there; call it after each optimizer.step(), before zero_grad()",
                TorchgraftWarning,
                stacklevel=3,
            )
