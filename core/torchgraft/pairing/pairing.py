"""What came of matching an adapter with a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torchgraft.adapter_files.reading import AdapterFiles
from torchgraft.errors import PairingError
from torchgraft.method.config import Config
from torchgraft.method.method import Method
from torchgraft.method.site import Site
from torchgraft.pairing.base import Base
from torchgraft.pairing.naming import described
from torchgraft.plugin.info import DISTRIBUTION
from torchgraft.plugin.registry import registry


@dataclass(frozen=True)
class PairedSite:
    site: Site
    config: Config
    own_name: str
    """What the adapter calls the site."""
    tensors: dict[str, str] = field(default_factory=dict)
    """The method's (or PEFT's) name of each tensor → its name in the file."""


@dataclass
class Pairing:
    files: AdapterFiles
    method: Method
    config: Config
    sites: list[PairedSite] = field(default_factory=list)
    also_train: tuple[str, ...] = ()
    trained: dict[str, str] = field(default_factory=dict)
    """The base's tensor that is replaced whole → the name in the adapter's file."""
    problems: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """The tensors in the adapter's file that have no place in the base."""
    renamed: dict[str, str] = field(default_factory=dict)
    """The adapter's name of a site or a module → the base's, where they differ."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """The same for every module of the base."""

    @property
    def tensor_names(self) -> dict[str, str]:
        """What the adapter calls the base's tensors that it changes → the base's names; empty if the names are the same."""
        prefix = self.files.prefix
        names = {f"{paired.own_name}.weight": f"{paired.site.name}.weight" for paired in self.sites}
        names |= {saved.removeprefix(prefix): own for own, saved in self.trained.items()}
        return names if any(name != own for name, own in names.items()) else {}

    @property
    def caveat(self) -> str:
        """What cannot be told of an adapter: of one that PEFT wrote, or that another version of a plugin made; or ""."""
        if self.files.record:
            return self.other_plugin
        named = self.files.peft.get("base_model_name_or_path")
        return (
            f"{self.files.directory}: PEFT records names and shapes, and nothing of the weights: whether this is its base"
            f"{f' ({named})' if named else ''}, and whether that was quantized in training, cannot be told"
        )

    @property
    def other_plugin(self) -> str:
        """Which other plugin, or version of it, the adapter was made with; or "". The bundled ones read what earlier ones wrote."""
        if self.files.record is None:
            return ""
        recorded, info = self.files.record.method, registry().info(self.method.name)
        made = (recorded.distribution or "", recorded.version or "")
        if made == (info.distribution, info.version) or made[0] == info.distribution == DISTRIBUTION or not made[0]:
            return ""
        return (
            f"{self.files.directory}: it was made with {' '.join(made)}, and {info.distribution} {info.version} is installed: "
            f"whether that {self.method.name} computes the same cannot be told"
        )

    @property
    def note(self) -> str:
        """What was made of names that differ, in one line; or ""."""
        return described(self.renamed)

    def demand(self, base: Base) -> Pairing:
        """
        Raises:
            PairingError: there are problems.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 1} more: 'adapt check' lists them)" if len(self.problems) > 1 else ""
            raise PairingError(f"{self.files.directory} does not fit {base.label}: {self.problems[0]}{more}", tuple(self.problems))
        return self
