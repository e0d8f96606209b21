"""Checks of adapters on a model: several adapters, copies, names, saving and loading."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from torchgraft.in_memory.adapter import Adapter, activate, adapters
from torchgraft.in_memory.load import load
from torchgraft.testing.cases import Case, part_of, perturb_
from torchgraft.testing.checks import FLOATS, check
from torchgraft.testing.compare import close, require, same_bits, snapshot, unchanged

NAMES = ("lora", "weight.bias", "default.default", "adapters_.params.A", "lora_A.weight", "base_layer.0")
"""Names of layers that break methods which search for adapters by name."""


@check()
def two_adapters(case: Case) -> None:
    """Two adapters on one layer compose in order, and either can be disabled or detached without affecting the other."""
    model = case.base()
    before = snapshot(model)
    pair = {name: case.attach(model, name, seed) for seed, name in enumerate(("one", "two"))}
    for seed, adapter in enumerate(pair.values(), 5):
        perturb_(adapter, seed)
    hint = (
        "look for what two adapters on one layer share: state outside params, or the weight with the earlier adapter in it (site.weight())"
    )
    together = model(case.x)
    for name, adapter in pair.items():
        activate(model, name)
        close(model(case.x), _alone(case, adapter), case.eps, f"the output with {name!r} alone active", hint)
    activate(model, *pair)
    pair["one"].merge()
    close(model(case.x), together, case.eps, "the output with the first merged, against both active", hint)
    pair["two"].merge()
    close(model(case.x), together, case.eps, "the output with both merged, against both active", hint)
    pair["two"].unmerge()
    pair["one"].detach()
    close(model(case.x), _alone(case, pair["two"]), case.eps, "the output after the first was detached", hint)
    pair["two"].detach()
    unchanged(model, before, "after both were detached", hint)


@torch.no_grad()
def _alone(case: Case, adapter: Adapter) -> Tensor:
    """Return the output of a model that has only this adapter's parameters."""
    model, other = case.adapted(perturb=False)
    for name, tensor in part_of(other).tensors().items():
        tensor.copy_(part_of(adapter).tensors()[name])
    output: Tensor = model(case.x)
    return output


@check(*FLOATS, core=True)
def save_load(case: Case) -> None:
    """An adapter that is saved and loaded onto another copy of the base gives the same output to the last bit."""
    model, adapter = case.adapted()
    expected = model(case.x)
    with TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "adapter")
        case.adapted(seed=99)  # overwrites state that the method stores elsewhere under the site's name
        again = case.base()
        load(again, Path(folder) / "adapter")
    hint = "everything that forward needs besides config and weight must be a tensor of adapter_init (in Method.buffers if not trained)"
    same_bits(again(case.x), expected, "the output after saving and loading", hint)


@check(layers="dense", first=True)
def cast(case: Case) -> None:
    """A model works after it, or a part of it, is cast with the adapter on it. Saved and loaded in that dtype, its output is the same."""
    model, adapter = case.adapted()
    model.to(torch.bfloat16)
    x = case.x.to(torch.bfloat16) if case.input.is_floating_point() else case.x
    expected = model(x)
    with TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "adapter")
        again = case.base().to(torch.bfloat16)
        load(again, Path(folder) / "adapter")
    hint = "everything that forward needs must be a tensor of adapter_init or adapter_shared, and not be stored elsewhere"
    same_bits(again(x), expected, "the output after casting, saving and loading", hint)
    pair = Named({"one": case.base().layer, "two": case.base().layer}).eval()
    perturb_(case.attach(pair, targets=("one", "two")))
    before = pair.get_submodule("one")(case.x)
    pair.get_submodule("two").to(torch.bfloat16)
    same_bits(pair.get_submodule("one")(case.x), before, "the output of a layer after another was cast", hint)


@check()
def state_dict(case: Case) -> None:
    """The base's entries in the state_dict are unchanged; the adapter adds one entry for each of its tensors, and load_state_dict works."""
    model = case.base()
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    adapter = case.attach(model)
    perturb_(adapter)
    now = model.state_dict()
    for key, value in before.items():
        require(key in now, f"the base's {key} is gone from the state_dict")
        same_bits(now[key], value, f"the base's {key} in the state_dict", "look for what writes to the layer")
    wanted = {f"layer.adapters.{adapter.name}.{name}" for name in part_of(adapter).tensors()}
    added = {key for key in now if key not in before and isinstance(now[key], Tensor)}
    require(added == wanted, f"the state_dict has the new keys {sorted(added)}, where the adapter's are {sorted(wanted)}")
    other, _ = case.adapted(perturb=False)
    if not case.kind.quantized and not case.hooks.has("adapter_prepare"):
        other.load_state_dict(now)
        hint = "everything that forward needs must be a tensor of adapter_init"
        same_bits(other(case.x), model(case.x), "the output after load_state_dict", hint)


@check()
def copies(case: Case) -> None:
    """deepcopy and pickle give a model with the same output and an adapter that is independent of the original."""
    model, adapter = case.adapted()
    expected = model(case.x)
    for how, copy in (("deepcopy", deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        hint = f"look for state that {how} does not copy, or copies share"
        same_bits(copy(case.x), expected, f"the output of the model's {how}", hint)
        own = adapters(copy)[adapter.name]
        perturb_(own, seed=8)
        same_bits(model(case.x), expected, f"the original's output, after its {how}'s parameters changed,", hint)
        changed = copy(case.x)
        require(not changed.equal(expected), f"changing the parameters of the {how} does not change its output; {hint}")
        own.merge()
        close(copy(case.x), changed, case.eps, f"the merged output of the {how}", hint)
        same_bits(model(case.x), expected, f"the original's output, after its {how} was merged,", hint)


class Named(nn.Module):
    """A model of layers under dotted names. Its output is the sum of the layers' outputs."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = tuple(layers)
        for name, layer in layers.items():
            *parents, last = name.split(".")
            owner: nn.Module = self
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            owner.add_module(last, layer)

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = [self.get_submodule(name)(x) for name in self.names]
        return torch.stack(outputs).sum(0)


@check(first=True)
def names(case: Case) -> None:
    """Layers may be called "lora", "weight" or "default": nothing depends on a layer's name."""
    base = Named({name: case.base().layer for name in NAMES}).eval()
    model = deepcopy(base)
    adapter = case.attach(model, targets=NAMES)
    found = {site.name for site in adapter.sites}
    require(found == set(NAMES), f"there are adapters on {sorted(found)}, where the layers are {sorted(NAMES)}")
    perturb_(adapter)
    expected = model(case.x)
    hint = "look for code in the method that depends on a name"
    with TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "adapter")
        load(base, Path(folder) / "adapter")
    same_bits(base(case.x), expected, "the output after saving and loading", hint)
    before = snapshot(model)
    adapter.merge()
    close(model(case.x), expected, case.eps, "the merged output", hint)
    adapter.unmerge()
    unchanged(model, before, "merged and unmerged", hint)
