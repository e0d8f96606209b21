"""Check that an adapter's tensors and the base's weights are the expected ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import replace

from torchgraft.adapter_files.reading import AdapterFiles
from torchgraft.checkpoint import fingerprint
from torchgraft.dtypes import ADAPTABLE
from torchgraft.errors import near
from torchgraft.kinds.kind import Shape
from torchgraft.layers.layer import is_inside, outer_names
from torchgraft.pairing.base import Base, layer_of
from torchgraft.pairing.native import SHOWN, no_layer
from torchgraft.pairing.pairing import PairedSite, Pairing
from torchgraft.plugin.registry import registry

OTHER_BASE = "the base's weight is not the one that the adapter was made for: another model, or one that was merged into"


def check_tensors(pairing: Pairing, base: Base) -> None:
    """Check that every expected tensor is present with its shape, and that there are no others."""
    files, used, prefix = pairing.files, set[str](), pairing.files.prefix
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
    absent = [name for name in files.recorded_sites if name not in base.layers]  # already reported
    whole, saved = frozenset(pairing.also_train), frozenset(files.record.also_saved if files.record else ())
    inside_of = _inside(base.tensors, whole)
    for module in pairing.also_train:
        inside = {name: base.tensors[name] for name in inside_of.get(module, ())}
        if not inside:
            absent.append(module)
            pairing.problems.append(f"{module}: the base has no such module{near(module, base.layers)}; the adapter contains it")
        pairing.trained.update({name: prefix + name for name in inside})
        pairing.problems += [p for name, shape in inside.items() if (p := _problem(files, prefix + name, shape))]
        used.update(prefix + name for name in inside)
    used.update(name for name in files.shapes if is_inside(name.removeprefix(prefix), saved))
    used.update(name for paired in pairing.sites if (name := _frozen_copy(files, paired)))
    pairing.unused = [name for name in files.shapes if name not in used]
    _add_left_over(pairing, [name for name in pairing.unused if not is_inside(name.removeprefix(prefix), absent)], base)


def _inside(tensors: Iterable[str], modules: Container[str]) -> dict[str, list[str]]:
    """Map each module to the tensors in it."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        for outer in outer_names(name):
            if outer in modules:
                found[outer].append(name)
    return found


def _frozen_copy(files: AdapterFiles, paired: PairedSite) -> str:
    """Return the name of the frozen weight that PEFT also saves for a targeted embedding or head, or ""."""
    name = f"{files.prefix}{paired.own_name}.base_layer.weight"
    return name if files.peft and files.shapes.get(name, ("", ()))[1] == paired.site.shape else ""


def check_weights(pairing: Pairing, base: Base) -> None:
    """Check that the base's weights have the recorded fingerprints."""
    for paired in pairing.sites:
        site, entry = paired.site, pairing.files.recorded_sites.get(paired.own_name)
        known = [(entry.dtype, entry.fingerprint)] if entry else []
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
        bare = name.removeprefix(pairing.files.prefix)
        owner = layer_of(bare, base.layers)
        module = owner or ".".join(bare.split(".")[:-2]) or bare
        groups[module].append(name)
    for module, found in groups.items():
        shown = ", ".join(found[:SHOWN]) + ("…" if len(found) > SHOWN else "")
        if module in base.layers:
            pairing.problems.append(f"{module}: unexpected adapter tensor {shown}")
        else:
            pairing.problems.append(f"{no_layer(module, pairing, base)} (adapter's tensor {shown})")
