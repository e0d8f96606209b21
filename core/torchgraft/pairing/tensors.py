"""Read the tensors of an adapter that was paired with a base."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torchgraft.errors import PairingError
from torchgraft.pairing.pairing import PairedSite, Pairing
from torchgraft.plugin.registry import registry

if TYPE_CHECKING:
    from torch import Tensor


def read_tensors(pairing: Pairing) -> dict[str, Tensor]:
    """Read the adapter's tensors by their names in its file.

    Raises:
        PairingError: one of them is not finite.
    """
    tensors = pairing.files.read_all()
    if problems := not_finite(pairing, tensors.__getitem__):
        raise PairingError(f"{pairing.files.directory}: {problems[0]}", tuple(problems))
    return tensors


def not_finite(pairing: Pairing, read: Callable[[str], Tensor]) -> list[str]:
    """Return a message for each tensor that has NaN or infinite entries. One tensor is read at a time."""
    from torchgraft.arithmetic.precision import all_finite

    where = {name: (paired.site.name, suffix) for paired in pairing.sites for suffix, name in paired.tensors.items()}
    where |= {name: (own.rpartition(".")[0], own.rpartition(".")[2]) for own, name in pairing.trained.items()}
    return [
        f"{layer}: the adapter's {leaf} has NaN or infinite entries, as after a run that diverged; use an earlier save"
        for name, (layer, leaf) in where.items()
        if name in pairing.files.shapes and not all_finite(read(name))
    ]


class AdapterTensors:
    """The tensors in an adapter's file.

    Raises:
        PairingError: one of them is not finite, or the tensors that its sites share are not those of training.
    """

    def __init__(self, pairing: Pairing) -> None:
        from torchgraft.plugin.shared_tensors import make_shared

        self.by_name = read_tensors(pairing)
        self._pairing = pairing
        sites = [paired.site for paired in pairing.sites]
        self._shared = make_shared(registry().hooks(pairing.method.name), sites, pairing.config)
        found, recorded = self._shared.digests(), pairing.files.record
        if recorded and found != recorded.shared:
            raise PairingError(
                f"{pairing.files.directory}: the tensors that its layers share are not saved, and {pairing.method.name} now creates "
                "others than in training; use the versions of torch and of the plugin with which the adapter was created"
            )

    def of_site(self, paired: PairedSite) -> dict[str, Tensor]:
        """Return the site's own tensors under the method's names."""
        pairing = self._pairing
        found = {suffix: self.by_name[name] for suffix, name in paired.tensors.items()}
        if pairing.files.peft and pairing.method.peft is not None:
            return pairing.method.peft.from_tensors(paired.site, paired.config, found, pairing.config)
        return found

    def params(self, paired: PairedSite) -> dict[str, Tensor]:
        """Return all tensors that the hooks receive: the site's own and the shared ones."""
        own = self.of_site(paired)
        return {**own, **self._shared.like(own)}
