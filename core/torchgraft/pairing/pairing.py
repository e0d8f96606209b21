"""The result of matching an adapter with a base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torchgraft.adapter_files.reading import AdapterFiles
from torchgraft.errors import PairingError
from torchgraft.kinds.kind import Shape
from torchgraft.method.config import Config
from torchgraft.method.method import Method
from torchgraft.method.site import Site
from torchgraft.pairing.base import Base
from torchgraft.pairing.naming import described
from torchgraft.plugin.info import DISTRIBUTION
from torchgraft.plugin.registry import registry


@dataclass(frozen=True)
class PairedSite:
    """A site of the adapter that was found in the base."""

    site: Site
    config: Config
    own_name: str
    """Name of the site in the adapter."""
    tensors: Mapping[str, str]
    """The method's (or PEFT's) name of each tensor → its name in the file."""
    shapes: Mapping[str, Shape]
    """The method's (or PEFT's) name of each tensor → the shape that it must have."""


def paired_site(files: AdapterFiles, method: Method, site: Site, config: Config, own_name: str) -> PairedSite:
    """Return the site with the tensors that its files must have: in PEFT's format if adapter_config.json is there, else in the method's."""
    format_ = method.peft if files.peft else None
    shapes = format_.shapes(site, config) if format_ else registry().hooks(method.name).shapes(site, config)
    return PairedSite(site, config, own_name, {suffix: f"{files.prefix}{own_name}.{suffix}" for suffix in shapes}, shapes)


@dataclass(frozen=True)
class Pairing:
    """The sites and modules of an adapter in a base, and the problems that were found."""

    files: AdapterFiles
    method: Method
    config: Config
    sites: tuple[PairedSite, ...] = ()
    also_train: tuple[str, ...] = ()
    trained: Mapping[str, str] = field(default_factory=dict)
    """Tensor of the base that is replaced → name in the adapter's file."""
    problems: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    """Tensors in the adapter's file that match nothing in the base."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Adapter's name of a site or a module → the base's name, where they differ."""
    remarks: tuple[str, ...] = ()
    """Decisions that the user may not expect."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Adapter's name → base's name, for every module of the base."""

    @property
    def tensor_names(self) -> dict[str, str]:
        """Map the adapter's names of the base tensors that it changes to the base's names; empty if all are the same."""
        prefix = self.files.prefix
        names = {f"{paired.own_name}.weight": f"{paired.site.name}.weight" for paired in self.sites}
        names |= {saved.removeprefix(prefix): own for own, saved in self.trained.items()}
        return names if any(name != own for name, own in names.items()) else {}

    @property
    def caveat(self) -> str:
        """What cannot be verified because PEFT wrote the adapter, or another version of a plugin created it; or ""."""
        if self.files.record:
            return self.other_plugin
        named = self.files.peft.get("base_model_name_or_path")
        return (
            f"{self.files.directory}: PEFT records only names and shapes, so torchgraft cannot verify that this is the right base"
            f"{f' ({named})' if named else ''} or whether it was quantized during training"
        )

    @property
    def other_plugin(self) -> str:
        """Warning that another plugin or version created the adapter, or "". Bundled plugins read what their earlier versions wrote."""
        if self.files.record is None:
            return ""
        recorded, info = self.files.record.method, registry().info(self.method.name)
        made = (recorded.distribution or "", recorded.version or "")
        if made == (info.distribution, info.version) or made[0] == info.distribution == DISTRIBUTION or not made[0]:
            return ""
        return (
            f"{self.files.directory}: created with {' '.join(made)}, but {info.distribution} {info.version} is installed; "
            f"its {self.method.name} may compute something else"
        )

    @property
    def note(self) -> str:
        """One line that describes how the names differ, or ""."""
        return described(self.renamed)

    def demand(self, base: Base) -> Pairing:
        """Return this pairing if it has no problems.

        Raises:
            PairingError: there are problems.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 1} more: 'adapt check' lists them)" if len(self.problems) > 1 else ""
            raise PairingError(f"{self.files.directory} does not fit {base.label}: {self.problems[0]}{more}", self.problems)
        return self

    def with_problems(self, found: Iterable[str]) -> Pairing:
        """Return a copy of this pairing with the messages `found` added to its problems."""
        return replace(self, problems=(*self.problems, *found))
