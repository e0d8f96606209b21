"""Models of 70 and 405 billion parameters, without their values; and that the work grows with the modules, not with their square."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

import torchgraft as tg
from command import Result
from models import Plain, perturb_
from torchgraft.in_memory.adapter import Count
from torchgraft.plugin.registry import registry

Adapt = Callable[..., Result]
VOCABULARY = 128256


@dataclass(frozen=True)
class Shape:
    blocks: int
    hidden: int
    inner: int
    heads: int
    shared: int = 8
    """Heads of keys and values."""

    def build(self, vocabulary: int = VOCABULARY, device: str = "meta") -> nn.Module:
        config = hf.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.shared,
            vocab_size=vocabulary,
        )
        with torch.device(device):
            return hf.LlamaForCausalLM(config)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of one block's."""
        h, narrow = self.hidden, self.hidden // self.heads * self.shared
        return [(h, h), (narrow, h), (narrow, h), (h, h), (self.inner, h), (self.inner, h), (h, self.inner)]

    @property
    def params(self) -> int:
        norms = (2 * self.blocks + 1) * self.hidden
        return self.blocks * sum(map(prod, self.matrices)) + 2 * VOCABULARY * self.hidden + norms


LLAMAS = {"70B": Shape(80, 8192, 28672, 64), "405B": Shape(126, 16384, 53248, 128)}
RANK = 16
ALSO: dict[str, Callable[[int, int], int]] = {"dora": lambda out, _: out}
"""What a method trains at a matrix beside A and B."""


@pytest.fixture(scope="module", params=LLAMAS)
def llama(request: pytest.FixtureRequest) -> tuple[Shape, nn.Module]:
    return LLAMAS[request.param], LLAMAS[request.param].build()


def test_the_shapes_are_those_of_llama(llama: tuple[Shape, nn.Module]) -> None:
    shape, model = llama
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.params
    assert shape.params == pytest.approx({80: 70.6e9, 126: 405.9e9}[shape.blocks], rel=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "dora" else ())  # it goes over the meta weights block by block
        for name in (method.name for method in registry().methods())
        if name != "qlora"
    ],
)
def test_adapters_are_counted_and_taken_off(llama: tuple[Shape, nn.Module], method: str) -> None:
    shape, model = llama
    before = dict(model.named_modules()), list(model.state_dict()), [type(module) for module in model.modules()]
    adapter = tg.apply(model, method, rank=RANK)
    assert len(adapter.sites) == 7 * shape.blocks
    also = ALSO.get(method, lambda *_: 0)
    rank = getattr(adapter.config, "r", RANK)  # adalora may start with more than it is to end with
    trained = shape.blocks * sum(rank * (out + width) + also(out, width) for out, width in shape.matrices)
    assert adapter.count() == Count(trained, shape.params + trained)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"{site}.adapters.default.{name}" for site, part in adapter.parts.items() for name, _ in part.named_parameters()
    }
    with pytest.raises(tg.AttachError, match="meta device and has no values to save"):
        adapter.save("nowhere")
    adapter.detach()
    after = dict(model.named_modules()), list(model.state_dict()), [type(module) for module in model.modules()]
    assert after == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_quantizing_needs_values(llama: tuple[Shape, nn.Module]) -> None:
    with pytest.raises(tg.TorchgraftError, match=r"meta device.*tg\.load_quantized"):
        tg.apply(llama[1], "qlora", rank=RANK)


def test_plans_of_patterns_roles_and_blocks(llama: tuple[Shape, nn.Module]) -> None:
    shape, model = llama
    plan = tg.plan(model, ["*.{q,v}_proj", "down_proj", r"re:.*\.o_proj", "!*.layers.3.*"], f"0-{shape.blocks - 2}")
    assert len(plan.sites) == 4 * (shape.blocks - 2)
    assert list(plan.patterns.values()) == [2 * (shape.blocks - 1), shape.blocks - 1, shape.blocks - 1, 7]
    assert plan.total_params == shape.params


def written(model: nn.Module, directory: Path, config: dict[str, Any]) -> Path:
    """The model's checkpoint in bfloat16: a header, and a hole in the file where the weights would be."""
    directory.mkdir()
    header, place = {}, 0
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [place, place + 2 * tensor.numel()]}
        place += 2 * tensor.numel()
    encoded = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + place)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_an_adapter_of_files_keeps_its_values_on_a_model_without(adapt: Adapt, tmp_path: Path, method: str) -> None:
    """Made from the 70B checkpoint's header, loaded onto the 70B model, saved again: to the last bit."""
    model = LLAMAS["70B"].build()
    checkpoint = written(model, tmp_path / "base", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    made = adapt("apply", checkpoint, "--plugin", method, "-r", 1, "--target", "*.{q,down}_proj", "-o", tmp_path / "first")
    assert made.code == 0, made.err
    adapter = tg.load(model, tmp_path / "first")
    assert len(adapter.sites) == 160
    assert {parameter.device.type for parameter in adapter.parameters()} == {"cpu"}
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".lora_A" in name)
    name = "model.layers.7.self_attn.q_proj"
    assert adapter.parts[name].tensors()["A"].equal(tensors[f"base_model.model.{name}.lora_A{'.weight' if method == 'lora' else ''}"])
    adapter.save(tmp_path / "second")
    again = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[key].equal(tensor) for key, tensor in tensors.items())
    first, second = (json.loads((tmp_path / place / "torchgraft.json").read_text()) for place in ("first", "second"))
    prints = [[site["fingerprint"] for site in record["sites"]] for record in (first, second)]
    assert prints[0] == prints[1]
    assert all(prints[0])
    adapter.detach()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_a_model_may_get_its_values_after_the_adapter(tmp_path: Path, method: str) -> None:
    torch.manual_seed(0)
    real, tokens = Plain(), torch.randint(0, 11, (2, 5))
    base = deepcopy(real)
    adapter = tg.apply(real, method, "@all", rank=3, also_train=["head"])
    perturb_(adapter.parameters())
    adapter.save(tmp_path)
    with torch.device("meta"):
        late = Plain()
    loaded = tg.load(late, tmp_path)
    assert all(not tensor.is_meta for _, tensor in loaded.named_parameters())
    with pytest.raises(RuntimeError):
        late(tokens)
    with pytest.raises(tg.MergeError, match="meta device"):
        loaded.merge()
    missing = late.load_state_dict(base.state_dict(), strict=False, assign=True).missing_keys
    assert all(".adapters." in key for key in missing)
    torch.testing.assert_close(late(tokens), real(tokens), rtol=0, atol=0)
    assert (late(tokens) - base(tokens)).abs().max() > 0.1
    loaded.merge()
    loaded.unmerge()
    loaded.detach()
    assert all(tensor.equal(base.state_dict()[key]) for key, tensor in late.state_dict().items())


def test_a_module_trained_whole_keeps_its_ties_and_dtypes_on_meta(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.second.weight = self.first.weight

    def model() -> nn.Module:
        return nn.ModuleDict({"body": nn.Linear(4, 4), "tail": Tied()}).bfloat16()

    real = model()
    adapter = tg.apply(real, "lora", ["body"], rank=2, also_train=["tail"])
    perturb_(adapter.parameters())
    adapter.save(tmp_path)
    with torch.device("meta"):
        late = model()
    copy = tg.load(late, tmp_path).copies["tail"].module
    expected = adapter.copies["tail"].module.state_dict()
    assert copy.second.weight is copy.first.weight
    assert all(parameter.requires_grad for parameter in copy.parameters())
    assert all(tensor.equal(expected[key]) and tensor.dtype == expected[key].dtype for key, tensor in copy.state_dict().items())


class Work:
    calls = 0
    """Of Python functions and of C's; each value that a generator gives is one more."""
    compiled = 0
    """Patterns."""


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    work, compile_ = Work(), re._compiler.compile  # type: ignore[attr-defined]  # what re.compile, re.match… come to, past their cache

    def note(frame: Any, event: str, argument: Any) -> None:
        work.calls += event in ("call", "c_call")

    def compiling(*arguments: Any) -> Any:
        work.compiled += 1
        return compile_(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(re._compiler, "compile", compiling)  # type: ignore[attr-defined]
        sys.setprofile(note)
        try:
            yield work
        finally:
            sys.setprofile(None)


PATTERNS = [f"*.{number % 8}.*.{leaf}" for number in range(10) for leaf in ("q_proj", "up_proj", "d?wn_proj")]
EACH = {f"*.layers.{number % 8}.*.{leaf}": {"rank": 2 + number % 3} for number in range(10) for leaf in ("q_proj", "up_proj", "*")}
SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "30 patterns": {"targets": PATTERNS},
    "overrides": {"overrides": EACH},
    "fully trained modules": {"targets": "@attention", "also_train": ["mlp"]},
}


def linear(stage: str, works: list[Work]) -> None:
    """Twice the layers give twice the work, beside what is always the same; a square would give four times as much."""
    (one, two, four) = (work.calls for work in works)
    assert one > 100
    assert four - two < 2.5 * (two - one), (stage, one, two, four)  # 2 if linear, 4 if quadratic; caches and collections add some
    assert works[-1].compiled <= 1.1 * works[-2].compiled, [work.compiled for work in works]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_work_is_linear_in_the_modules(situation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of planning, attaching, saving, pairing (our format and PEFT's), merging and detaching."""
    stages: dict[str, list[Work]] = {}

    def do(stage: str, action: Callable[[], Any]) -> Any:
        re.purge()
        with counted(monkeypatch) as work:
            result = action()
        stages.setdefault(stage, []).append(work)
        return result

    options = SITUATIONS[situation]
    selection = {key: options[key] for key in ("targets", "also_train") if key in options}
    for blocks in (2, 8, 16, 32):  # the first, which is dropped, fills what is kept for good
        model, directory = Shape(blocks, 16, 24, 2, 1).build(32, "cpu"), tmp_path / str(blocks)
        chosen = {**options, "allow_unmatched": blocks == 2}
        if blocks == 2:
            chosen.pop("overrides", None)
        do("plan", lambda: tg.plan(model, **selection, allow_unmatched=True))  # noqa: B023
        adapter = do("attach", lambda: tg.apply(model, "lora", rank=1, **chosen))  # noqa: B023
        do("save", lambda: adapter.save(directory))  # noqa: B023
        do("detach", adapter.detach)
        loaded = do("load", lambda: tg.load(model, directory))  # noqa: B023
        do("merge", loaded.merge)
        loaded.detach()
        (directory / "torchgraft.json").unlink()
        do("load of PEFT's", lambda: tg.load(model, directory))  # noqa: B023
    for stage, works in stages.items():
        linear(stage, works[1:])
