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

OTHER_BASE = "the base's weight is not the one that the adapter was made for: another model, or one that was merged into"


def with_tensors(pairing: Pairing, base: Base) -> Pairing:
    """Return the pairing with its whole modules, the unused tensors, and a problem for each tensor that is missing, wrong or unexpected."""
    files, prefix = pairing.files, pairing.files.prefix
    inside = _inside(base.tensors, frozenset(pairing.also_train))
    trained = {name: prefix + name for module in pairing.also_train for name in inside.get(module, ())}
    problems = [*pairing.problems, *(problem for paired in pairing.sites for problem in _site_problems(pairing, paired))]
    for module in pairing.also_train:
        if module not in inside:
            problems.append(f"{module}: the base has no such module{near(module, base.layers)}; the adapter contains it")
        problems += [p for name in inside.get(module, ()) if (p := _problem(files, prefix + name, base.tensors[name]))]
    used = _used(pairing) | set(trained.values())
    unused = [name for name in files.shapes if name not in used]
    reported = [name for name in files.recorded_sites if name not in base.layers]
    reported += [module for module in pairing.also_train if module not in inside]
    left_over = [name for name in unused if not is_inside(name.removeprefix(prefix), reported)]
    if whole := _base_tensors(files, files.shapes.keys() - trained.values() - _saved(files), base):
        problems.insert(
            0,
            f"the adapter's file also holds the model itself ({len(whole)} of the base's own weights, {whole[0]}…): it was saved by "
            "torch.save or from a state dict; save the adapter alone, with PeftModel.save_pretrained",
        )
        left_over = [name for name in left_over if name not in whole]
    problems += _left_over_problems(files, left_over, base, len(problems))
    return replace(pairing, trained=trained, problems=tuple(problems), unused=tuple(unused))


def _site_problems(pairing: Pairing, paired: PairedSite) -> list[str]:
    files = pairing.files
    exempt = pairing.method.buffers if not files.peft else ()  # a method's own buffers may be indices or masks
    problems = (
        _problem(files, paired.tensors[suffix], shape) or ("" if suffix in exempt else _type_problem(files, paired.tensors[suffix]))
        for suffix, shape in paired.shapes.items()
    )
    return [problem for problem in problems if problem]


def _used(pairing: Pairing) -> set[str]:
    """Return the names of the tensors in the adapter's file that belong to its sites, or to modules of the model it was saved from."""
    files = pairing.files
    used = {name for paired in pairing.sites for name in (*paired.tensors.values(), _frozen_copy(files, paired)) if name}
    return used | _saved(files)


def _saved(files: AdapterFiles) -> set[str]:
    """Return the names of the tensors of modules that PEFT expects because their names end like a fully trained one's."""
    saved = frozenset(files.record.also_saved if files.record else ())
    return {name for name in files.shapes if is_inside(name.removeprefix(files.prefix), saved)}


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


def weight_problems(pairing: Pairing, base: Base) -> list[str]:
    """Return a problem for each weight of the base whose fingerprint differs from the recorded one."""
    return [f"{paired.site.name}: {OTHER_BASE}" for paired in pairing.sites if _is_other_weight(pairing.files, paired, base)]


def _is_other_weight(files: AdapterFiles, paired: PairedSite, base: Base) -> bool:
    site, entry = paired.site, files.recorded_sites.get(paired.own_name)
    known = [(entry.dtype, entry.fingerprint)] if entry else []
    if name := _frozen_copy(files, paired):
        known.append((files.shapes[name][0], fingerprint.of_tensor(files.read(name))))
    return any(
        recorded and fingerprint.comparable(site.dtype, dtype) and base.fingerprint(site.name) not in ("", recorded)
        for dtype, recorded in known
    )


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


def _base_tensors(files: AdapterFiles, names: Iterable[str], base: Base) -> list[str]:
    """Return those of `names` that are weights of the base, if they are most of its weights."""
    bare = {name: name.removeprefix(files.prefix).replace(".base_layer.", ".") for name in names}
    found = sorted(name for name, own in bare.items() if own in base.tensors)
    return found if 2 * len(found) > len(base.tensors) else []


def _left_over_problems(files: AdapterFiles, names: list[str], base: Base, earlier: int) -> list[str]:
    """Return one problem for each module that the tensors `names` would belong to; `earlier` problems were found before."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        bare = name.removeprefix(files.prefix)
        owner = layer_of(bare, base.layers)
        groups[owner or ".".join(bare.split(".")[:-2]) or bare].append(name)
    problems = []
    for number, (module, found) in enumerate(groups.items(), earlier):
        shown = ", ".join(found[:SHOWN]) + ("…" if len(found) > SHOWN else "")
        if module in base.layers:
            problems.append(f"{module}: unexpected adapter tensor {shown}")
        else:
            problems.append(f"{no_layer(module, base, number)} (adapter's tensor {shown})")
    return problems
