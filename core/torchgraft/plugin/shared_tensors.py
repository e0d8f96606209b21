"""The tensors that all sites of an adapter share (hook adapter_shared)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchgraft.hashes import sha256_of_tensor
from torchgraft.method.site import Site
from torchgraft.plugin.method_hooks import MethodHooks


class SharedTensors:
    """As they were made, on the CPU, and one copy for each device and dtype that the tensors of sites have.

    They are no buffers: moving or casting one layer must not move them under the others, and what is on the meta device must
    come back with its values.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._made = {name: tensor.detach() for name, tensor in tensors.items()}
        self._copies: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def __iter__(self) -> Any:
        return iter(self._made)

    def like(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the device, and in the dtype, of a site's own tensors."""
        first = next((tensor for tensor in own.values() if tensor.is_floating_point()), None)
        if first is None or not self._made:
            return self._made
        key = (first.device, first.dtype)
        if key not in self._copies:
            self._copies[key] = {
                name: tensor.to(first.device, first.dtype if tensor.is_floating_point() else None) for name, tensor in self._made.items()
            }
        return self._copies[key]

    def digests(self) -> dict[str, str]:
        """SHA-256 of each, for they are not saved, and must be the same when they are made again."""
        return {name: sha256_of_tensor(tensor) for name, tensor in self._made.items()}

    def __deepcopy__(self, memo: Any) -> SharedTensors:
        return self  # nobody changes them

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": self._made, "_copies": {}}


def make_shared(hooks: MethodHooks, sites: Sequence[Site], config: Any) -> SharedTensors:
    with torch.device("cpu"):
        return SharedTensors(hooks.shared(sites, config))
