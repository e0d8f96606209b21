"""What a plugin says of its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torchgraft.config import Config
from torchgraft.kinds import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from torchgraft.site import Site


class PeftFormat(Protocol):
    """How a method's adapters stand in PEFT's files. Suffixes are what follows the layer's name: "lora_A.weight"."""

    def to_config(self, site: Site, config: Any, default: Any) -> dict[str, Any]:
        """The entries of adapter_config.json for one site: peft_type, r, lora_alpha, and what differs from PEFT's defaults.

        PEFT has r and lora_alpha per site; all else it has once, so take that from `default`, the adapter's own config.
        """

    def from_config(self, peft: Mapping[str, Any], site: Site | None = None) -> Config | None:
        """The method's config for a PEFT config whose r and lora_alpha are those of `site`; None if it is another method's.

        Raises:
            PairingError: the config asks for something that the method does not do.
        """

    def groups(self, shape: Shape, tensors: Mapping[str, Shape]) -> int:
        """Of a layer whose weight has `shape`, from its tensors' shapes: a checkpoint does not tell it."""

    def shapes(self, site: Site, config: Any) -> dict[str, Shape]:
        """Suffix → shape of every tensor of one site."""

    def to_tensors(self, site: Site, config: Any, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Suffix → tensor, from the method's own parameters."""

    def from_tensors(self, site: Site, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_tensors`."""


@dataclass(frozen=True)
class Method:
    """A method's identity, returned by the hook `adapter_method`."""

    name: str
    """The same as the plugin's entry point."""
    config: type[Config]
    summary: str
    """One line for `adapt plugins list`."""
    reference: str
    """The paper."""
    kinds: frozenset[str] | None = None
    """The kinds of layer that it works on; None for all, those of other plugins included."""
    buffers: frozenset[str] = frozenset()
    """Which of the tensors that `adapter_init` returns are saved but not trained."""
    peft: PeftFormat | None = None
    """None if PEFT has no such method: its adapters are then saved in the native form only."""
