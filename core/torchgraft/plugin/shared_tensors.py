"""Tensors that all sites of an adapter share (hook `adapter_shared`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchgraft.hashes import sha256_of_tensor
from torchgraft.method.site import Site
from torchgraft.plugin.method_hooks import MethodHooks


class SharedTensors:
    """The shared tensors on the CPU, and a copy for each device and dtype of the sites' own tensors.

    They are not registered as buffers, because moving or casting one layer must not move the tensors that other layers use, and a
    model on the meta device must not lose their values.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._made = {name: tensor.detach() for name, tensor in tensors.items()}
        self._copies: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def __iter__(self) -> Any:
        return iter(self._made)

    def like(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors on the device and in the dtype of a site's `own` tensors."""
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
        """Return the SHA-256 of each tensor. The tensors are not saved; these hashes show whether a later run creates the same ones."""
        return {name: sha256_of_tensor(tensor) for name, tensor in self._made.items()}

    def __deepcopy__(self, memo: Any) -> SharedTensors:
        return self  # they never change

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": self._made, "_copies": {}}


def make_shared(hooks: MethodHooks, sites: Sequence[Site], config: Any) -> SharedTensors:
    """Call the method's `adapter_shared` on the CPU."""
    with torch.device("cpu"):
        return SharedTensors(hooks.shared(sites, config))
