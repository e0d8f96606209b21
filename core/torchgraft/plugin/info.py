"""Read what an installed distribution's metadata states about a plugin, without loading the plugin."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from torchgraft.errors import PluginError
from torchgraft.version import __version__

DISTRIBUTION = "torchgraft"


@dataclass(frozen=True)
class PluginInfo:
    """One plugin, loaded or not. `error` is the reason why it cannot be used, or empty."""

    name: str
    distribution: str
    version: str
    entry_point: str
    error: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.entry_point}, from {self.distribution} {self.version})"

    @property
    def way_out(self) -> str:
        """What the user can do about the error."""
        return f"update or uninstall {self.distribution}, or set TORCHGRAFT_PLUGINS to the plugins that may be loaded"


def info_of(point: EntryPoint) -> PluginInfo:
    dist = point.dist
    return PluginInfo(point.name, dist.name if dist else "(unknown)", dist.version if dist else "", point.value)


def check_version(point: EntryPoint) -> None:
    """Check that the plugin's distribution accepts this version of torchgraft; pip can upgrade one without the other.

    Raises:
        PluginError: it requires another version.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    dist = point.dist
    for requirement in map(Requirement, (dist.requires or ()) if dist is not None and dist.name != DISTRIBUTION else ()):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        fits = requirement.specifier.contains(__version__, prereleases=True)
        if canonicalize_name(requirement.name) == DISTRIBUTION and applies and not fits:
            raise PluginError(f"it requires {requirement}, and this is torchgraft {__version__}")


def bundled_first(point: EntryPoint) -> tuple[bool, str, str]:
    """Sort key: the bundled plugins, then by name and distribution."""
    distribution = info_of(point).distribution
    return (distribution != DISTRIBUTION, point.name, distribution)


def name_taken(info: PluginInfo, holder: PluginInfo) -> str:
    return f"the name {info.name!r} of {info} is taken by {holder}"


def is_allowed(name: str) -> bool:
    allowed = os.environ.get("TORCHGRAFT_PLUGINS")
    return allowed is None or name in {word.strip() for word in allowed.split(",")}


def is_strict() -> bool:
    return os.environ.get("TORCHGRAFT_STRICT", "") not in ("", "0")
