"""Does this adapter belong on this base? Answered from names, shapes and samples, before anything is read or changed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torchgraft import peft_names
from torchgraft.adapter_files import AdapterFiles
from torchgraft.bases import Base, PairedSite, Pairing, layer_of
from torchgraft.checkpoint import fingerprint
from torchgraft.dtypes import ADAPTABLE
from torchgraft.errors import PairingError, PluginError, near
from torchgraft.kinds.kind import Shape
from torchgraft.layers.layer import Layer, is_inside, outer_names
from torchgraft.layers.plan import site_of
from torchgraft.method.config import parse_config
from torchgraft.method.method import Method
from torchgraft.naming import Naming, own_names
from torchgraft.peft_pairing import pair_peft
from torchgraft.plugin.registry import registry

SHOWN = 3
OTHER_BASE = "the base's weight is not the one that the adapter was made for: another model, or one that was merged into"


def pair(files: AdapterFiles, base: Base) -> Pairing:
    """Match every tensor of the adapter with its place in the base. All problems are collected, not only the first.

    If some of the adapter's names have no place, other names of the base are tried (see `naming`); one naming must fit them all.

    Raises:
        PluginError: the method is not installed.
        PairingError: no installed method reads this adapter.
        ConfigError: its options are not valid.
    """
    pairing = _match(files, base)
    if pairing.problems and pairing.unused:
        pairing = _match_renamed(files, base, pairing)
    _check_weights(pairing, base)
    return pairing


def pair_as(files: AdapterFiles, base: Base, names: Mapping[str, str]) -> Pairing:
    """As `pair`, under the names that were found before (`Pairing.tensor_names`), and without a look at the weights."""
    if not names:
        return _match(files, base)
    others = set(names.values())
    return _match_as(files, base, Naming({**{name: name for name in base.tensors if name not in others}, **names}))


def _match(files: AdapterFiles, base: Base) -> Pairing:
    """By names, kinds and shapes."""
    pairing = _pair_native(files, base) if files.native else pair_peft(files, base)
    _check_tensors(pairing, base)
    return pairing


def _match_renamed(files: AdapterFiles, base: Base, exact: Pairing) -> Pairing:
    """The one pairing under other names that has no problems; else the one that says best what is wrong.

    Raises:
        PairingError: two prefixes would do.
    """
    names = [name.removeprefix(_prefix(files)) for name in files.shapes]
    best = _best([exact, *_with_a_prefix(files, base, own_names(base.tensors), names)])
    if not best.problems:
        return best
    try:
        namings = base.namings()
    except PairingError as error:
        best.problems[0] += f" ({error})"
        return best
    for naming in namings:
        plain = _match_as(files, base, naming)
        best = _best([best, plain, *(_with_a_prefix(files, base, naming, names) if plain.problems else ())])
        if not best.problems:
            break
    return best


def _with_a_prefix(files: AdapterFiles, base: Base, naming: Naming, names: list[str]) -> list[Pairing]:
    tried = [_match_as(files, base, other) for other in naming.prefixed(names)]
    fits = [pairing.note for pairing in tried if not pairing.problems]
    if len(fits) > 1:
        raise PairingError(
            f"{files.directory} fits {base.label} in more than one place, and nothing tells which is meant: {'; or '.join(fits)}"
        )
    return tried


def _best(tried: list[Pairing]) -> Pairing:
    """The first without problems; else the first of those that find a place for the most tensors."""
    return min(tried, key=lambda pairing: (bool(pairing.problems), len(pairing.unused)))


def _match_as(files: AdapterFiles, base: Base, naming: Naming) -> Pairing:
    return _in_base_names(_match(files, base.named(naming)), naming, base.is_module)


def _in_base_names(pairing: Pairing, naming: Naming, is_module: bool) -> Pairing:
    """The pairing that was made under the names of `naming`, with the base's own."""
    for index, paired in enumerate(pairing.sites):
        pairing.sites[index] = replace(paired, site=replace(paired.site, name=naming.modules[paired.site.name]))
    modules = {name: naming.module(name) for name in pairing.also_train}
    for name, own in modules.items() if is_module else ():
        if not own and any(is_inside(tensor, [name]) for tensor in naming.tensors):
            pairing.problems.append(f"{name}: the adapter holds it whole, and what is in it has other names here, so it cannot be replaced")
    pairing.also_train = tuple(own or name for name, own in modules.items())
    pairing.trained = {naming.tensors[name]: saved for name, saved in pairing.trained.items()}
    renamed = {paired.own_name: paired.site.name for paired in pairing.sites} | {name: own for name, own in modules.items() if own}
    pairing.renamed = {name: own for name, own in renamed.items() if name != own}
    pairing.modules = naming.modules
    return pairing


def _pair_native(files: AdapterFiles, base: Base) -> Pairing:
    record = files.native
    method = _method_of(files)
    config = parse_config(method.name, method.config, record["config"])
    pairing = Pairing(files, method, config, also_train=tuple(record["also_train"]))
    twice = [name for name, count in Counter(entry["name"] for entry in record["sites"]).items() if count > 1]
    pairing.problems += [f"{name}: the adapter's record has it twice" for name in twice]
    for entry in record["sites"]:
        layer, problem = _find_layer(entry, base)
        if layer is None:
            pairing.problems.append(problem or _no_layer(entry["name"], pairing, base))
            continue
        if entry.get("bias", layer.has_bias) != layer.has_bias and registry().hooks(method.name).merges_bias:
            with_, without = ("the base", "the adapter's") if layer.has_bias else ("the adapter's", "the base")
            pairing.problems.append(f"{entry['name']}: {with_} layer has a bias and {without} has none, which {method.name} changes, too")
        own = config.with_(method.name, entry["config"])
        pairing.sites.append(PairedSite(site_of(layer), own, entry["name"]))
    return pairing


def _method_of(files: AdapterFiles) -> Method:
    """
    Raises:
        PluginError: it cannot be had; says what the adapter was made with.
    """
    recorded = files.native["method"]
    try:
        return registry().method(recorded["name"])
    except PluginError as error:
        made = " ".join(str(recorded[key]) for key in ("distribution", "version") if recorded.get(key))
        raise PluginError(f"{files.directory}: it was made with {made or 'another installation'}: {error}") from None


def _find_layer(entry: Mapping[str, Any], base: Base) -> tuple[Layer | None, str]:
    """The base's layer for one recorded site, of the recorded kind; or what is wrong with it, which is "" if there is none."""
    name, shape, kind = entry["name"], tuple(entry["shape"]), entry["kind"]
    layer = base.layers.get(name)
    if layer is None:
        return None, ""
    if layer.shape != shape:
        return None, f"{name}: the adapter was made for a weight of shape {list(shape)}, the base's is {list(layer.shape)}"
    if layer.kind is None and layer.is_open:  # the record knows the orientation that the files do not tell
        if not registry().kind(kind).fits(shape):
            return None, f"{name}: a {kind}'s weight cannot have the shape {list(shape)}"
        layer = replace(layer, kind=kind)
    if layer.kind is None:
        return None, f"{name}: {layer.reason or 'is no layer that an adapter can be put on'}"
    if kind not in (layer.kind, registry().kind(layer.kind).stored_as):
        return None, f"{name}: the adapter was made for a {kind}, the base has a {layer.kind} there"
    return replace(layer, groups=entry.get("groups", 1)), ""


def _no_layer(name: str, pairing: Pairing, base: Base) -> str:
    """With names that resemble it, for the first few: looking for them takes long where hundreds of layers are missing."""
    return f"{name}: the base has no such layer{near(name, base.layers) if len(pairing.problems) < SHOWN else ''}"


def _check_tensors(pairing: Pairing, base: Base) -> None:
    """Every expected tensor is there with its shape, and there is no other."""
    files, used, prefix = pairing.files, set[str](), _prefix(pairing.files)
    for index, paired in enumerate(pairing.sites):
        expected = _expected(pairing, paired)
        named = {suffix: f"{prefix}{paired.own_name}.{suffix}" for suffix in expected}
        pairing.sites[index] = replace(paired, tensors=named)
        used.update(named.values())
        exempt = pairing.method.buffers if not files.peft else ()  # a method's own buffers may be indices or masks
        problems = (
            _problem(files, named[suffix], shape) or ("" if suffix in exempt else _type_problem(files, named[suffix]))
            for suffix, shape in expected.items()
        )
        pairing.problems += [problem for problem in problems if problem]
    absent = [entry["name"] for entry in files.native.get("sites", []) if entry["name"] not in base.layers]  # a problem already
    whole, saved = frozenset(pairing.also_train), frozenset(files.native.get("also_saved", []))
    inside_of = _inside(base.tensors, whole)
    for module in pairing.also_train:
        inside = {name: base.tensors[name] for name in inside_of.get(module, ())}
        if not inside:
            absent.append(module)
            pairing.problems.append(f"{module}: the base has no such module{near(module, base.layers)}; the adapter holds it whole")
        pairing.trained.update({name: prefix + name for name in inside})
        pairing.problems += [p for name, shape in inside.items() if (p := _problem(files, prefix + name, shape))]
        used.update(prefix + name for name in inside)
    used.update(name for name in files.shapes if is_inside(name.removeprefix(prefix), saved))
    used.update(name for paired in pairing.sites if (name := _frozen_copy(files, paired)))
    pairing.unused = [name for name in files.shapes if name not in used]
    _add_left_over(pairing, [name for name in pairing.unused if not is_inside(name.removeprefix(prefix), absent)], base)


def _inside(tensors: Iterable[str], modules: Container[str]) -> dict[str, list[str]]:
    """Module → the tensors in it."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        for outer in outer_names(name):
            if outer in modules:
                found[outer].append(name)
    return found


def _prefix(files: AdapterFiles) -> str:
    """What stands before the names in the file."""
    return peft_names.PREFIX if files.peft else ""


def _frozen_copy(files: AdapterFiles, paired: PairedSite) -> str:
    """PEFT saves the frozen weight of a targeted embedding or head, too: that tensor's name, or ""."""
    name = f"{peft_names.PREFIX}{paired.own_name}.base_layer.weight"
    return name if files.peft and files.shapes.get(name, ("", ()))[1] == paired.site.shape else ""


def _check_weights(pairing: Pairing, base: Base) -> None:
    """The base's weights are those that the adapter was made for, as far as it tells."""
    recorded = {entry["name"]: entry for entry in pairing.files.native.get("sites", [])}
    for paired in pairing.sites:
        site, entry = paired.site, recorded.get(paired.own_name, {})
        known = [(entry.get("dtype", ""), entry.get("fingerprint", ""))]
        if name := _frozen_copy(pairing.files, paired):
            known.append((pairing.files.shapes[name][0], fingerprint.of_tensor(pairing.files.read(name))))
        for dtype, print_ in known:
            if print_ and fingerprint.comparable(site.dtype, dtype) and base.fingerprint(site.name) not in ("", print_):
                pairing.problems.append(f"{site.name}: {OTHER_BASE}")
                break


def _expected(pairing: Pairing, paired: PairedSite) -> dict[str, Shape]:
    if pairing.files.peft and pairing.method.peft is not None:
        return pairing.method.peft.shapes(paired.site, paired.config)
    return registry().hooks(pairing.method.name).shapes(paired.site, paired.config)


def _problem(files: AdapterFiles, name: str, expected: Shape) -> str:
    if name not in files.shapes:
        return f"the tensor {name!r} is missing from {files.tensor_file.name}"
    _, shape = files.shapes[name]
    if shape != expected and 0 in shape:
        return f"the tensor {name!r} is empty, shape {list(shape)}: it was saved while sharded (ZeRO-3, FSDP); save it gathered"
    if shape != expected:
        return f"the tensor {name!r} has the shape {list(shape)}, expected {list(expected)}"
    return ""


def _type_problem(files: AdapterFiles, name: str) -> str:
    dtype, _ = files.shapes[name]
    return "" if dtype in ADAPTABLE else f"the tensor {name!r} has the type {dtype}, expected one of {', '.join(sorted(ADAPTABLE))}"


def _add_left_over(pairing: Pairing, names: list[str], base: Base) -> None:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        bare = name.removeprefix(_prefix(pairing.files))
        owner = layer_of(bare, base.layers)
        module = owner or ".".join(bare.split(".")[:-2]) or bare
        groups[module].append(name)
    for module, found in groups.items():
        shown = ", ".join(found[:SHOWN]) + ("…" if len(found) > SHOWN else "")
        if module in base.layers:
            pairing.problems.append(f"{module}: the adapter's tensor {shown} has no use there")
        else:
            pairing.problems.append(f"{_no_layer(module, pairing, base)} (adapter's tensor {shown})")
