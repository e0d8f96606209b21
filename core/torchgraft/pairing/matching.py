"""Decide from names, shapes and samples whether an adapter fits a base, before any tensor is loaded or changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torchgraft.adapter_files.reading import AdapterFiles
from torchgraft.errors import PairingError
from torchgraft.layers.layer import is_inside
from torchgraft.pairing.base import Base
from torchgraft.pairing.naming import Naming, own_names
from torchgraft.pairing.native import pair_native
from torchgraft.pairing.pairing import Pairing
from torchgraft.pairing.peft import pair_peft
from torchgraft.pairing.tensor_checks import weight_problems, with_tensors


def pair(files: AdapterFiles, base: Base) -> Pairing:
    """Match every tensor of the adapter with its place in the base, and collect all problems.

    If some of the adapter's names are not in the base, the base is tried under other names (see `naming`); one naming must fit all.

    Raises:
        PluginError: the method is not installed.
        PairingError: no installed method reads this adapter.
        ConfigError: its options are not valid.
    """
    pairing = _match_by_names(files, base)
    if pairing.problems and pairing.unused and (other := files.unwrapped()):
        pairing = _best([pairing, _with_remark(_match_by_names(other, base))])
    return pairing.with_problems(weight_problems(pairing, base))


def _match_by_names(files: AdapterFiles, base: Base) -> Pairing:
    """Match under the adapter's own names, else under others."""
    pairing = _match(files, base)
    return _match_renamed(files, base, pairing) if pairing.problems and pairing.unused else pairing


def _with_remark(pairing: Pairing) -> Pairing:
    example = next(iter(pairing.files.names.values()))
    remark = f"the adapter's names contain segments of wrappers, or the adapter's name, which are left out ({example})"
    return replace(pairing, remarks=(remark, *pairing.remarks))


def pair_as(files: AdapterFiles, base: Base, names: Mapping[str, str]) -> Pairing:
    """Pair under names that `pair` found before (`Pairing.tensor_names`), without checking the weights."""
    pairing = _match_under(files, base, names)
    if pairing.problems and (other := files.unwrapped()):
        return _best([pairing, _match_under(other, base, names)])
    return pairing


def _match_under(files: AdapterFiles, base: Base, names: Mapping[str, str]) -> Pairing:
    if not names:
        return _match(files, base, complete=False)
    others = set(names.values())
    naming = Naming({**{name: name for name in base.tensors if name not in others}, **names})
    return _in_base_names(_match(files, base.named(naming), complete=False), naming, base.is_module)


def _match(files: AdapterFiles, base: Base, *, complete: bool = True) -> Pairing:
    """Match by names, kinds and shapes; if `complete`, every layer that PEFT's config targets must have tensors."""
    return with_tensors(pair_native(files, base) if files.record else pair_peft(files, base, complete=complete), base)


def _match_renamed(files: AdapterFiles, base: Base, exact: Pairing) -> Pairing:
    """Return the pairing under other names that has no problems, else the one that fits the most tensors.

    Raises:
        PairingError: two prefixes fit.
    """
    names = [name.removeprefix(files.prefix) for name in files.shapes]
    best = _best([exact, *_with_a_prefix(files, base, own_names(base.tensors), names)])
    if not best.problems:
        return best
    namings = iter(base.namings())
    while best.problems:
        try:
            naming = next(namings, None)
        except PairingError as error:
            return replace(best, problems=(f"{best.problems[0]} ({error})", *best.problems[1:]))
        if naming is None:
            break
        plain = _match_as(files, base, naming)
        best = _best([best, plain, *(_with_a_prefix(files, base, naming, names) if plain.problems else ())])
    return best


def _with_a_prefix(files: AdapterFiles, base: Base, naming: Naming, names: list[str]) -> list[Pairing]:
    tried = [_match_as(files, base, other) for other in naming.prefixed(names)]
    fits = [pairing.note for pairing in tried if not pairing.problems]
    if len(fits) > 1:
        raise PairingError(
            f"{files.directory} fits {base.label} in more than one place, and it is ambiguous which is meant: {'; or '.join(fits)}"
        )
    return tried


def _best(tried: list[Pairing]) -> Pairing:
    """Return the first pairing without problems, else the first that fits the most tensors."""
    return min(tried, key=lambda pairing: (bool(pairing.problems), len(pairing.unused)))


def _match_as(files: AdapterFiles, base: Base, naming: Naming) -> Pairing:
    return _in_base_names(_match(files, base.named(naming)), naming, base.is_module)


def _in_base_names(pairing: Pairing, naming: Naming, is_module: bool) -> Pairing:
    """Return a pairing under the names of `naming` with the base's own names."""
    sites = tuple(replace(paired, site=replace(paired.site, name=naming.modules[paired.site.name])) for paired in pairing.sites)
    modules = {name: naming.module(name) for name in pairing.also_train}
    renamed = {paired.own_name: paired.site.name for paired in sites} | {name: own for name, own in modules.items() if own}
    scattered = [
        f"{name}: the adapter contains the whole module, but its tensors have other names here, so it cannot be replaced"
        for name, own in modules.items()
        if is_module and not own and any(is_inside(tensor, [name]) for tensor in naming.tensors)
    ]
    return replace(
        pairing.with_problems(scattered),
        sites=sites,
        also_train=tuple(own or name for name, own in modules.items()),
        trained={naming.tensors[name]: saved for name, saved in pairing.trained.items()},
        renamed={name: own for name, own in renamed.items() if name != own},
        modules=naming.modules,
    )
