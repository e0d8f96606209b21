"""Does this adapter belong on this base? Answered from names, shapes and samples, before anything is read or changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torchgraft import fingerprint, peft_names
from torchgraft.adapter_files import AdapterFiles
from torchgraft.checkpoint import Checkpoint
from torchgraft.checkpoint_layers import layers_of_checkpoint
from torchgraft.config import Config, parse_config
from torchgraft.errors import PairingError, TorchgraftError
from torchgraft.kinds import Shape
from torchgraft.layers import Layer, by_name
from torchgraft.manager import registry
from torchgraft.method import Method
from torchgraft.planning import site_of
from torchgraft.selection import near
from torchgraft.site import Site

if TYPE_CHECKING:
    from torch import nn

SHOWN = 3
OTHER_BASE = "the base's weight is not the one that the adapter was made for: another model, or one that was merged into"


@dataclass(frozen=True)
class Base:
    """A model or a checkpoint, as far as pairing looks at it."""

    label: str
    layers: Mapping[str, Layer]
    tensors: Mapping[str, Shape]
    fingerprint: Callable[[str], str]
    """Of the layer's weight."""
    is_module: bool


@dataclass(frozen=True)
class PairedSite:
    site: Site
    config: Config
    tensors: dict[str, str]
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

    def demand(self, base: Base) -> Pairing:
        """
        Raises:
            PairingError: there are problems.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 1} more: 'adapt check' lists them)" if len(self.problems) > 1 else ""
            raise PairingError(f"{self.files.directory} does not fit {base.label}: {self.problems[0]}{more}", tuple(self.problems))
        return self


def base_of_checkpoint(checkpoint: Checkpoint, kinds: Mapping[str, str] | None = None) -> Base:
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    layers = by_name(layers_of_checkpoint(checkpoint, kinds))
    return Base(str(checkpoint.root), layers, shapes, lambda name: fingerprint.of_file(checkpoint, f"{name}.weight"), is_module=False)


def base_of_module(model: nn.Module) -> Base:
    from torchgraft.module_layers import layers_of_module, own_state

    layers = by_name(layers_of_module(model, registry().kinds()))
    shapes = {name: tuple(tensor.shape) for name, tensor in own_state(model).items()}

    def sample(name: str) -> str:
        return fingerprint.of_tensor(model.get_submodule(name).weight)  # type: ignore[arg-type]

    return Base(type(model).__name__, layers, shapes, sample, is_module=True)


def pair(files: AdapterFiles, base: Base) -> Pairing:
    """Match every tensor of the adapter with its place in the base. All problems are collected, not only the first.

    Raises:
        PluginError: the method is not installed.
        PairingError: no installed method reads this adapter.
        ConfigError: its options are not valid.
    """
    pairing = _pair_native(files, base) if files.native else _pair_peft(files, base)
    _check_tensors(pairing, base)
    return pairing


def _pair_native(files: AdapterFiles, base: Base) -> Pairing:
    record = files.native
    method = registry().method(record["method"]["name"])
    config = parse_config(method.name, method.config, record["config"])
    pairing = Pairing(files, method, config, also_train=tuple(record["also_train"]))
    for entry in record["sites"]:
        layer, problem = _find_layer(entry, base)
        if layer is None:
            pairing.problems.append(problem)
            continue
        own = config.with_(method.name, entry["config"])
        pairing.sites.append(PairedSite(site_of(layer), own, {}))
        print_ = entry.get("fingerprint")
        if print_ and fingerprint.comparable(layer.dtype, entry["dtype"]) and base.fingerprint(layer.name) not in ("", print_):
            pairing.problems.append(f"{layer.name}: {OTHER_BASE}")
    return pairing


def _find_layer(entry: Mapping[str, Any], base: Base) -> tuple[Layer | None, str]:
    """The base's layer for one recorded site, of the recorded kind; or what is wrong with it."""
    name, shape, kind = entry["name"], tuple(entry["shape"]), entry["kind"]
    layer = base.layers.get(name)
    if layer is None:
        return None, f"{name}: the base has no such layer{near(name, base.layers)}"
    if layer.shape != shape:
        return None, f"{name}: the adapter was made for a weight of shape {list(shape)}, the base's is {list(layer.shape)}"
    if layer.kind is None and not base.is_module:
        layer = replace(layer, kind=kind)  # the record knows what the files do not tell
    if layer.kind is None:
        return None, f"{name}: {layer.reason or 'is no layer that an adapter can be put on'}"
    if layer.kind != kind:
        return None, f"{name}: the adapter was made for a {kind}, the base has a {layer.kind} there"
    return replace(layer, groups=entry.get("groups", 1)), ""


def _pair_peft(files: AdapterFiles, base: Base) -> Pairing:
    method, config = _method_of_peft(files)
    assert method.peft is not None
    also_train = _saved_modules(files, base)
    pairing = Pairing(files, method, config, also_train=also_train)
    sites: dict[str, str] = {}
    for key in files.shapes:
        name = key.removeprefix(peft_names.PREFIX)
        if name == key:
            pairing.problems.append(f"the tensor {key!r} does not start with {peft_names.PREFIX!r}, as PEFT's names do")
        elif not _is_inside(name, also_train):
            sites[name] = _owner(name, base.layers)
    for name in dict.fromkeys(owner for owner in sites.values() if owner):
        _pair_peft_site(
            pairing, files, base.layers[name], [peft_names.PREFIX + key for key, owner in sites.items() if owner == name], base.is_module
        )
    for layer in dict.fromkeys(base.layers.values()):
        if layer.kind is not None and layer.name not in sites.values() and peft_names.is_target(files.peft, layer):
            pairing.problems.append(f"{layer.name}: the adapter's target_modules name this layer, and there is no tensor for it")
    return pairing


def _pair_peft_site(pairing: Pairing, files: AdapterFiles, layer: Layer, tensors: list[str], is_module: bool) -> None:
    peft = dict(files.peft)
    named = {name: files.shapes[name][1] for name in tensors}
    if layer.kind is None:
        pairing.problems.append(
            f"{layer.name}: {layer.reason or f'is a {layer.role} layer of shape {list(layer.shape)}, which no adapter fits'}"
        )
        return
    assert pairing.method.peft is not None
    suffixes = {name.removeprefix(f"{peft_names.PREFIX}{layer.name}."): shape for name, shape in named.items()}
    groups = layer.groups if is_module else pairing.method.peft.groups(layer.shape, suffixes)
    site = site_of(replace(layer, groups=groups))
    try:
        peft["r"] = peft_names.pattern_value(peft.get("rank_pattern") or {}, layer.name, peft.get("r", 8))
        peft["lora_alpha"] = peft_names.pattern_value(peft.get("alpha_pattern") or {}, layer.name, peft.get("lora_alpha", 8))
        config = pairing.method.peft.from_config(peft, site)
    except (TypeError, ValueError) as error:
        pairing.problems.append(f"{layer.name}: adapter_config.json is not valid for it: {' '.join(str(error).split())}")
        return
    except PairingError as error:
        pairing.problems.append(str(error))
        return
    assert config is not None
    pairing.sites.append(PairedSite(site, config, {}))


def _method_of_peft(files: AdapterFiles) -> tuple[Method, Config]:
    kind = files.peft.get("peft_type")
    for method in registry().methods():
        try:
            config = method.peft.from_config(files.peft) if method.peft is not None else None
        except (TypeError, ValueError) as error:
            raise PairingError(f"{files.directory}: adapter_config.json is not valid: {' '.join(str(error).split())}") from None
        if config is not None:
            return method, config
    said = f"peft_type {kind!r}" + (" with use_dora" if files.peft.get("use_dora") else "")
    raise PairingError(f"{files.directory}: no installed method reads PEFT's {said}; see 'adapt plugins list'")


def _saved_modules(files: AdapterFiles, base: Base) -> tuple[str, ...]:
    """The base's modules that `modules_to_save` names; and the names that it alone explains, though the base lacks them."""
    wanted = tuple(files.peft.get("modules_to_save") or [])
    found = peft_names.saved_modules(wanted, _parents(base.tensors))
    in_file = _parents(name.removeprefix(peft_names.PREFIX) for name in files.shapes)
    absent = [name for name in in_file if any(name == want or name.endswith(f".{want}") for want in wanted) and not _is_inside(name, found)]
    return (*found, *absent)


def _parents(tensors: Iterable[str]) -> list[str]:
    """Every module that the names of tensors imply."""
    return sorted({name[:place] for name in tensors for place, character in enumerate(name) if character == "."})


def _owner(tensor: str, layers: Mapping[str, Layer]) -> str:
    """The layer whose name the tensor's begins with; the longest such, or ""."""
    segments = tensor.split(".")
    names = (".".join(segments[:end]) for end in range(len(segments) - 1, 0, -1))
    return next((layers[name].name for name in names if name in layers), "")


def _is_inside(name: str, modules: Any) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _check_tensors(pairing: Pairing, base: Base) -> None:
    """Every expected tensor is there with its shape, and there is no other."""
    files, used = pairing.files, set[str]()
    prefix = peft_names.PREFIX if files.peft else ""
    for index, paired in enumerate(pairing.sites):
        expected = _expected(pairing, paired)
        named = {suffix: f"{prefix}{paired.site.name}.{suffix}" for suffix in expected}
        pairing.sites[index] = PairedSite(paired.site, paired.config, named)
        used.update(named.values())
        pairing.problems += [p for suffix, shape in expected.items() if (p := _problem(files, named[suffix], shape))]
    for module in pairing.also_train:
        inside = {name: shape for name, shape in base.tensors.items() if _is_inside(name, [module])}
        if not inside:
            pairing.problems.append(f"{module}: the base has no such module{near(module, base.layers)}; the adapter holds it whole")
        pairing.trained.update({name: prefix + name for name in inside})
        pairing.problems += [p for name, shape in inside.items() if (p := _problem(files, prefix + name, shape))]
        used.update(
            name
            for name in files.shapes
            if _is_inside(name.removeprefix(prefix), [module]) and (inside == {} or name.removeprefix(prefix) in inside)
        )
    for module in files.native.get("also_saved", []):
        used.update(name for name in files.shapes if _is_inside(name.removeprefix(prefix), [module]))
    used.update(_frozen_copies(pairing, base))
    pairing.problems += _left_over([name for name in files.shapes if name not in used], base, prefix)


def _frozen_copies(pairing: Pairing, base: Base) -> list[str]:
    """PEFT saves the frozen weight of a targeted embedding or head, too. It tells whether this base is the right one."""
    found = []
    for site in (paired.site for paired in pairing.sites) if pairing.files.peft else ():
        name = f"{peft_names.PREFIX}{site.name}.base_layer.weight"
        dtype, shape = pairing.files.shapes.get(name, ("", ()))
        if shape == site.shape:
            found.append(name)
            if fingerprint.comparable(site.dtype, dtype) and base.fingerprint(site.name) not in (
                "",
                fingerprint.of_tensor(pairing.files.read(name)),
            ):
                pairing.problems.append(f"{site.name}: {OTHER_BASE}")
    return found


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


def _left_over(names: list[str], base: Base, prefix: str) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        bare = name.removeprefix(prefix)
        owner = _owner(bare, base.layers)
        module = owner or ".".join(bare.split(".")[:-2]) or bare
        groups[module].append(name)
    problems = []
    for module, found in groups.items():
        shown = ", ".join(found[:SHOWN]) + ("…" if len(found) > SHOWN else "")
        if module in base.layers:
            problems.append(f"{module}: the adapter's tensor {shown} has no use there")
        else:
            problems.append(f"{module}: the base has no such layer{near(module, base.layers)} (adapter's tensor {shown})")
    return problems


def check(files: AdapterFiles, base: Base) -> list[str]:
    """Every problem of this adapter on this base; empty if they fit."""
    try:
        return pair(files, base).problems
    except TorchgraftError as error:
        return [str(error)]
