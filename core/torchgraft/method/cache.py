"""Values that a method derives from frozen tensors, stored until one of those tensors changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torchgraft.kinds.kind import traced

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle


class Entry(NamedTuple):
    """A cached value, with the tensors that it was computed from and their versions at that time."""

    inputs: list[Tensor]
    versions: list[tuple[int, int, int]]
    value: Tensor


class StepCounter:
    """Counts the steps of every optimizer in the process, by a hook that torch calls after each step.

    Fused optimizers write parameters without raising torch's version count, so a step is the only sign of the change. The hook
    is registered once, at the first value that depends on a trainable tensor, and stays until `remove`.
    """

    def __init__(self) -> None:
        self._count = 0
        self._hook: RemovableHandle | None = None

    def count(self) -> int:
        """Return the number of steps so far, and start to count at the first call."""
        if self._hook is None:
            from torch.optim.optimizer import register_optimizer_step_post_hook

            self._hook = register_optimizer_step_post_hook(self._increment)
        return self._count

    def remove(self) -> None:
        """Remove the hook. Values that were cached with it are then stale, because later steps go unseen."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._count += 1

    def _increment(self, *_: Any) -> None:
        self._count += 1


class Cache:
    """The cached values of one layer. See `Site.cached` for when they are computed again."""

    steps: ClassVar = StepCounter()
    """One counter for the process: torch's hook is process-wide too."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        """Entries by key. A method may store other values of its own here."""

    def get(self, key: str, inputs: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """Return the cached value, or compute it if it is missing or stale."""
        import torch

        if traced():  # a compiler would make one more graph for each state that it finds the cache in
            return compute()
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        if trained or any(tensor.is_inference() for tensor in inputs):
            self.values.pop(key, None)
            return compute()
        versions = [(tensor._version, tensor.data_ptr(), self.steps.count() if tensor.requires_grad else 0) for tensor in inputs]
        found: Entry | None = self.values.get(key)
        if found is not None and found.value.is_inference() and torch.is_grad_enabled():
            found = None  # autograd refuses inference tensors
        if found is None or found.versions != versions or any(old is not new for old, new in zip(found.inputs, inputs, strict=True)):
            found = self.values[key] = Entry(list(inputs), versions, compute())
        return found.value

    def keep_only(self, weight: Tensor) -> None:
        """Drop the entries that depend on a tensor other than `weight`."""
        for key, entry in list(self.values.items()):
            if isinstance(entry, Entry) and any(tensor is not weight for tensor in entry.inputs):
                del self.values[key]
