"""What a plugin says of its method."""

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
"""What a parameter is to its method: it decides about learning rate and weight decay, as a name or a shape must not."""


class PeftFormat(Protocol):
    """How a method's adapters stand in PEFT's files. Suffixes are what follows the layer's name: "lora_A.weight"."""

    def document(self, sites: Sequence[tuple[Site, Any]], default: Any) -> dict[str, Any]:
        """The entries of adapter_config.json: peft_type, the method's own, and those that say how sites differ.

        `sites` come with their configs; `default` is the adapter's own. The engine adds names and target_modules.
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

    def to_tensors(self, site: Site, config: Any, params: Mapping[str, Tensor], default: Any) -> dict[str, Tensor]:
        """Suffix → tensor, from the method's own parameters."""

    def from_tensors(self, site: Site, config: Any, tensors: Mapping[str, Tensor], default: Any) -> dict[str, Tensor]:
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
    roles: Mapping[str, Role] = field(default_factory=dict)
    """Tensor → its role, for `tg.scaled_param_groups`."""
    additive: bool = False
    """Whether what a merge adds to weight and bias depends on neither: such adapters can be merged in any order, and with factors."""
    starts_unchanged: bool = True
    """Whether, with default options, the output at the start is the base's. `torchgraft.testing` proves what is claimed here."""
    partial_gradients: frozenset[str] = frozenset()
    """The parameters whose gradient leaves something out on purpose, such as a norm that is taken for a constant."""
    compiles: bool = True
    """Whether torch.compile makes one graph of a layer with such an adapter."""
    peft: PeftFormat | None = None
    """None if PEFT has no such method: its adapters are then saved in the native form only."""

    def __post_init__(self) -> None:
        if wrong := {name: role for name, role in self.roles.items() if role not in get_args(Role)}:
            raise PluginError(f"{self.name}: roles={wrong}; a role can be {', '.join(get_args(Role))}")
