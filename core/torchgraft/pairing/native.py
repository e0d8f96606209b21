"""Pair an adapter by torchgraft's record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torchgraft.adapter_files.reading import AdapterFiles
from torchgraft.adapter_files.record import MethodRecord, SiteRecord
from torchgraft.errors import PluginError, near
from torchgraft.layers.layer import Layer
from torchgraft.layers.plan import site_of
from torchgraft.method.config import parse_config
from torchgraft.method.method import Method
from torchgraft.pairing.base import Base
from torchgraft.pairing.pairing import PairedSite, Pairing, paired_site
from torchgraft.plugin.registry import registry

SHOWN = 3


def pair_native(files: AdapterFiles, base: Base) -> Pairing:
    """Match the sites of the record with the base's layers."""
    record = files.record
    assert record is not None
    method = _method_of(files.directory, record.method)
    config = parse_config(method.name, method.config, record.config)
    merges_bias = registry().hooks(method.name).merges_bias
    sites = list[PairedSite]()
    problems = [f"{name}: the adapter's record lists it twice" for name in _repeated(entry.name for entry in record.sites)]
    for entry in record.sites:
        layer, problem = _find_layer(entry, base)
        if layer is None:
            problems.append(problem or no_layer(entry.name, base, len(problems)))
            continue
        if merges_bias and entry.bias not in (None, layer.has_bias):
            with_, without = ("the base", "the adapter's") if layer.has_bias else ("the adapter's", "the base")
            problems.append(f"{entry.name}: {with_} layer has a bias and {without} has none, which {method.name} changes, too")
        sites.append(paired_site(files, method, site_of(layer), config.with_(method.name, entry.config), entry.name))
    return Pairing(files, method, config, tuple(sites), also_train=tuple(record.also_train), problems=tuple(problems))


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _method_of(directory: Path, recorded: MethodRecord) -> Method:
    """Return the method that the record names.

    Raises:
        PluginError: it is not available; the message shows which plugin the adapter was created with.
    """
    try:
        return registry().method(recorded.name)
    except PluginError as error:
        made = " ".join(part for part in (recorded.distribution, recorded.version) if part)
        raise PluginError(f"{directory}: created with {made or 'another installation'}: {error}") from None


def _find_layer(entry: SiteRecord, base: Base) -> tuple[Layer | None, str]:
    """Return (layer, "") for one recorded site, or (None, problem); the problem is "" if the base has no such layer."""
    name, shape, kind = entry.name, entry.shape, entry.kind
    layer = base.layers.get(name)
    if layer is None:
        return None, ""
    if layer.shape != shape:
        return None, f"{name}: the adapter expects a weight of shape {list(shape)}, the base has {list(layer.shape)}"
    if layer.kind is None and layer.is_open:  # the record has the orientation, which the files do not show
        if not registry().kind(kind).fits(shape):
            return None, f"{name}: a {kind}'s weight cannot have the shape {list(shape)}"
        layer = replace(layer, kind=kind)
    if layer.kind is None:
        return None, f"{name}: {layer.reason or 'is not a layer that can have an adapter'}"
    if kind not in (layer.kind, registry().kind(layer.kind).stored_as):
        return None, f"{name}: the adapter expects a {kind}, the base has a {layer.kind}"
    return replace(layer, groups=entry.groups), ""


def no_layer(name: str, base: Base, earlier: int) -> str:
    """Return the message for a missing layer, with near names unless many problems came before: the search is slow for hundreds."""
    return f"{name}: the base has no such layer{near(name, base.layers) if earlier < SHOWN else ''}"
