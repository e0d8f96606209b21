"""The description of a method that its plugin provides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from torchgraft.errors import PluginError
from torchgraft.kinds.kind import Shape
from torchgraft.method.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from torchgraft.method.site import Site


Role = Literal["A", "B", "magnitude"]
"""Role of a parameter in its method. It decides about learning rate and weight decay, because a name or a shape must not."""


class PeftFormat(Protocol):
    """Conversion of a method's adapters to and from PEFT's format. A suffix follows the layer's name, such as "lora_A.weight"."""

    def document(self, sites: Sequence[tuple[Site, Any]], default: Any) -> dict[str, Any]:
        """Return the entries of adapter_config.json: peft_type, the method's own, and those that record how sites differ.

        `sites` come with their configs; `default` is the adapter's own. The engine adds names and target_modules.
        """

    def from_config(self, peft: Mapping[str, Any], site: Site | None = None) -> Config | None:
        """Return the method's config for a PEFT config whose r and lora_alpha are those of `site`; None if it is another method's.

        Raises:
            PairingError: the config has an option that the method does not support.
        """

    def groups(self, shape: Shape, tensors: Mapping[str, Shape]) -> int:
        """Return the number of groups of a layer whose weight has `shape`, from its tensors' shapes: a checkpoint does not record it."""

    def shapes(self, site: Site, config: Any) -> dict[str, Shape]:
        """Return suffix → shape of every tensor of one site."""

    def to_tensors(self, site: Site, config: Any, params: Mapping[str, Tensor], default: Any) -> dict[str, Tensor]:
        """Return suffix → tensor, from the method's own parameters."""

    def from_tensors(self, site: Site, config: Any, tensors: Mapping[str, Tensor], default: Any) -> dict[str, Tensor]:
        """Return the method's own parameters: the inverse of `to_tensors`."""


@dataclass(frozen=True)
class Method:
    """The description of a method, returned by the hook `adapter_method`."""

    name: str
    """Name of the method and of the plugin's entry point."""
    config: type[Config]
    summary: str
    """One line for `adapt plugins list`."""
    reference: str
    """Reference to the paper."""
    kinds: frozenset[str] | None = None
    """Names of the kinds of layer that the method works on; None for all, including those of other plugins."""
    buffers: frozenset[str] = frozenset()
    """Names of the tensors of `adapter_init` that are saved but not trained."""
    roles: Mapping[str, Role] = field(default_factory=dict)
    """Roles of the tensors by name, for `tg.scaled_param_groups`."""
    additive: bool = False
    """Whether the change that a merge adds to weight and bias depends on neither. Such adapters merge in any order, and with factors."""
    starts_unchanged: bool = True
    """Whether the output at the start, with default options, is the base's. `torchgraft.testing` tests this claim."""
    partial_gradients: frozenset[str] = frozenset()
    """Names of the parameters whose gradient is deliberately partial, for example because a norm is treated as a constant."""
    compiles: bool = True
    """Whether torch.compile makes one graph of a layer with such an adapter."""
    peft: PeftFormat | None = None
    """Conversion to PEFT's format; None if PEFT has no such method, so that its adapters are saved in the native form only."""

    def __post_init__(self) -> None:
        if wrong := {name: role for name, role in self.roles.items() if role not in get_args(Role)}:
            raise PluginError(f"{self.name}: roles={wrong}; a role can be {', '.join(get_args(Role))}")
