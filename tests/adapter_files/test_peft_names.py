"""Names in PEFT's files: of tensors and config keys, and the patterns that pick layers, as PEFT itself matches them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import models
import torchgraft as tg
from torchgraft.adapter_files import peft_names
from torchgraft.layers.layer import Layer

# What PEFT says on its own account: none of it is about the adapter's file.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "`is_gradient_checkpointing` is deprecated",  # it reads a name that transformers has replaced
        "fan_in_fan_out is set to",  # it sees by itself whether a layer is a Conv1D
    )
]

FILES = {"adapter_config.json", "adapter_model.safetensors", "torchgraft.json"}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class EveryKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv1d, self.embedding = nn.Linear(6, 5), Conv1D(5, 6), nn.Embedding(11, 6)
        self.conv_1 = nn.Conv1d(4, 6, 3)
        self.conv_2 = nn.Conv2d(4, 6, (2, 3))
        self.conv_3 = nn.Conv3d(4, 6, (1, 2, 3), groups=2)
        self.head = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))


SHAPES = {
    "linear.lora_A.weight": (2, 6),
    "linear.lora_B.weight": (5, 2),
    "conv1d.lora_A.weight": (2, 6),  # stored (in, out), and yet as of a Linear
    "conv1d.lora_B.weight": (5, 2),
    "embedding.lora_embedding_A": (2, 11),
    "embedding.lora_embedding_B": (6, 2),
    "conv_1.lora_A.weight": (2, 4, 3),
    "conv_1.lora_B.weight": (6, 2, 1),
    "conv_2.lora_A.weight": (2, 4, 2, 3),
    "conv_2.lora_B.weight": (6, 2, 1, 1),
    "conv_3.lora_A.weight": (4, 4, 1, 2, 3),
    "conv_3.lora_B.weight": (6, 2, 1, 1, 1),
    "head.0.weight": (5,),
    "head.0.bias": (5,),
    "head.1.weight": (3, 5),
    "head.1.bias": (3,),
}


def test_names_shapes_and_metadata_are_peft_s(tmp_path: Path) -> None:
    adapter = tg.apply(EveryKind(), "lora", ["@all"], rank=2, also_train=["head"], name="french", dtype="bfloat16")
    adapter.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert found == {f"base_model.model.{name}": shape for name, shape in SHAPES.items()}
    assert {name for name, dtype in dtypes.items() if dtype == "BF16"} == {name for name in found if "lora" in name}


def test_pissa_is_written_at_twice_its_rank(tmp_path: Path) -> None:
    tg.apply(EveryKind(), "lora", ["linear", "embedding"], rank=2, alpha=6, init="pissa", overrides={"linear": {"rank": 1}}).save(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        "base_model.model.linear.lora_A.weight": (2, 6),
        "base_model.model.linear.lora_B.weight": (5, 2),
        "base_model.model.embedding.lora_embedding_A": (4, 11),
        "base_model.model.embedding.lora_embedding_B": (6, 4),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_bytes())
    assert config["init_lora_weights"] is True


def test_the_config_file_has_sorted_keys_and_what_loaders_need(tmp_path: Path) -> None:
    model = models.build("llama")
    model.config._name_or_path = "someone/some-model"
    tg.apply(model, "lora", ["*.{v,q}_proj"], rank=4, alpha=8, dropout=0.1).save(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text.rstrip("\n") == json.dumps(config, indent=2, sort_keys=True)
    expected = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "someone/some-model",
        "task_type": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    assert config.items() >= expected.items()
    assert type(config["lora_alpha"]) is int  # other loaders declare an int
    read = peft.LoraConfig.from_pretrained(tmp_path).to_dict()  # it warns of, that is fails here on, keys that it does not know
    assert {key: read[key] for key in config if key != "target_modules"} == {k: v for k, v in config.items() if k != "target_modules"}


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.tensor([[3, 9, 4, 7, 5]])).logits


def peft_trains(base: nn.Module, directory: Path, **options: Any) -> nn.Module:
    """A PEFT adapter away from its start, and saved."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, **options)).eval()
    models.perturb_([parameter for parameter in model.parameters() if parameter.requires_grad])
    model.save_pretrained(directory)
    return model


def adapted_by(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "base_layer")}


SELECTIONS: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "whole names": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]},
    "a regex": {"target_modules": r".*\.(0|1)\.self_attn\.[qv]_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear with excludes": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.0.mlp.up_proj"]},
    "an excluding regex": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1\..*"},
    "one block": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "blocks of a list": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "whole modules": {"target_modules": ["q_proj", "lm_head.x"], "modules_to_save": ["lm_head", "layers.1.self_attn"]},
    "ranks and alphas": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.\d\.mlp\.(up|gate)_proj": 5, "1.self_attn.v_proj": 4, "v_proj": 6},
        "alpha_pattern": {"self_attn.q_proj": 1, "layers.0.*": 20, "q_proj": 7},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS)
def test_we_read_peft_s_selections(options: dict[str, Any], tmp_path: Path) -> None:
    trained = peft_trains(models.build("llama"), tmp_path, **options)
    model = models.build("llama")
    adapter = tg.load(model, tmp_path)
    assert {site.name for site in adapter.sites} == adapted_by(trained)
    # Not `trained`: PEFT saves patterns in another order, and then takes other values where they overlap.
    torch.testing.assert_close(logits(model), logits(peft.PeftModel.from_pretrained(models.build("llama"), tmp_path)), **CLOSE)
    assert (logits(model) - logits(models.build("llama"))).abs().max() > 1e-2


@pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS)
def test_a_layer_that_the_selection_names_and_the_file_lacks_is_missed(options: dict[str, Any], tmp_path: Path) -> None:
    trained = peft_trains(models.build("llama"), tmp_path, **options)
    gone = sorted(adapted_by(trained))[0]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if f".{gone}." not in name}, tmp_path / "adapter_model.safetensors")
    edit_config(tmp_path, target_modules=options["target_modules"])  # PEFT writes the names that all-linear stands for
    with pytest.raises(tg.PairingError) as caught:
        tg.load(models.build("llama"), tmp_path)
    assert [gone in problem for problem in caught.value.problems] == [True]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_all_linear_is_the_same_layers_for_peft_and_us(family: str, tmp_path: Path) -> None:
    trained = peft_trains(models.build(family), tmp_path, target_modules="all-linear")
    edit_config(tmp_path, target_modules="all-linear")
    assert {site.name for site in tg.load(models.build(family), tmp_path).sites} == adapted_by(trained)


SEGMENTS = ["a", "b", "ab", "a_b", "layers", "h", "0", "1", "11"]
SIGNS = ["a+b", "a*", "*a", "(a", "a)", "a|b", "[ab]", "a$", "^a", "a\\", "a?", "{2}", "a{2}", "aa"]


def dotted(segments: list[str], longest: int = 4) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(segments), min_size=1, max_size=longest).map(".".join)


PLAIN, ANY = dotted(SEGMENTS), dotted(SEGMENTS + SIGNS)
REGEXES = st.sampled_from([r".*a", r"a.*", r".*\.0\..*", r"(a|b)\..*", r".*\.(a|ab)", r"layers\.\d+\.a", r"[^.]*", r".*"])
FEW = st.lists(dotted(SEGMENTS, 2), max_size=3, unique=True)


@given(st.lists(PLAIN, min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=300)
def test_target_modules_mean_what_peft_takes_them_for(names: list[str], data: st.DataObject) -> None:
    options: dict[str, Any] = {
        "target_modules": data.draw(FEW.filter(bool) | REGEXES),
        "exclude_modules": data.draw(st.none() | FEW | REGEXES),
        "modules_to_save": data.draw(st.none() | FEW),
    }
    if isinstance(options["target_modules"], list):
        options["layers_to_transform"] = data.draw(st.none() | st.integers(0, 1) | st.lists(st.sampled_from([0, 1, 11]), max_size=2))
        if options["layers_to_transform"] is not None:
            options["layers_pattern"] = data.draw(st.sampled_from([None, [], "h", "layers", ["h", "layers"], ["a.h"]]))
    config = peft.LoraConfig(**options)
    for name in names:
        layer = Layer(name, "Linear", (2, 3), "float32", 6, 24)
        assert peft_names.is_target(options, layer) == bool(check_target_module_exists(config, name)), name


def peft_value(pattern: dict[str, int], name: str) -> int:
    """As in PEFT's inject_adapter."""
    return pattern.get(get_pattern_key(list(pattern), name), -1)


@given(st.dictionaries(PLAIN | REGEXES | ANY.map(re.escape), st.integers(0, 9), max_size=5), st.lists(PLAIN, min_size=1, max_size=8))
@settings(deadline=None, max_examples=300)
def test_patterns_give_the_values_that_peft_takes(pattern: dict[str, int], names: list[str]) -> None:
    for name in names:
        assert peft_names.pattern_value(pattern, name, -1) == peft_value(pattern, name), name


@pytest.mark.parametrize("name", ["a+b", "a*", "a|b", "[ab]", "a$", "^a", "a?", "a{2}"])
def test_a_pattern_that_is_a_layer_s_exact_name_counts_as_in_peft(name: str) -> None:
    """PEFT looks the name itself up when no key matches it as a regex."""
    assert peft_value({name: 3}, name) == 3
    assert peft_names.pattern_value({name: 3}, name, -1) == 3


@given(st.lists(ANY, min_size=1, max_size=8, unique=True), st.data())
@settings(deadline=None, max_examples=300)
def test_the_patterns_we_write_match_one_layer_each_in_any_order(sites: list[str], data: st.DataObject) -> None:
    own = data.draw(st.dictionaries(st.sampled_from(sites), st.integers(0, 99), max_size=len(sites)))
    written = peft_names.patterns(own, sites)
    for order in (dict(sorted(written.items())), dict(sorted(written.items(), reverse=True))):
        for site in sites:
            assert peft_value(order, site) == own.get(site, -1), (site, written)
            assert peft_names.pattern_value(order, site, -1) == own.get(site, -1), (site, written)


def test_a_pattern_s_dot_matches_no_letter_of_another_layer() -> None:
    assert set(peft_names.patterns({"a.b": 1, "x.c.d": 2}, ["a.b", "axb", "x.c.d", "xxc.d"])) == {r"^a\.b", r"^x\.c\.d"}
    assert set(peft_names.patterns({"a.b": 1, "axb": 2}, ["a.b", "z.axb"])) == {r"^a\.b", "axb"}


@given(st.lists(ANY, min_size=1, max_size=8, unique=True), st.data())
@settings(deadline=None, max_examples=300)
def test_the_targets_we_write_match_the_sites_and_nothing_else(names: list[str], data: st.DataObject) -> None:
    sites = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    config = peft.LoraConfig(target_modules=peft_names.targets(sites, names))
    assert {name for name in names if check_target_module_exists(config, name)} == set(sites)


class Chain(nn.Module):
    """Linear layers of any names, nested at the dots, one after the other."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        for name in names:
            *containers, leaf = name.split(".")
            module: nn.Module = self
            for container in containers:
                if container not in module._modules:
                    module.add_module(container, nn.Module())
                module = module._modules[container]
            module.add_module(leaf, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


CHAINS = {
    "ends of one another": ["proj", "inner.proj", "deep.inner.proj", "a_proj", "proj1"],
    "numbers": ["1.proj", "11.proj", "layers.1.proj", "layers.11.proj"],
    "dots that are any character": ["x.a.b", "c.a.b", "c.aXb", "cXaXb"],
    "signs of regexes": ["a+b", "aab", "x|y", "y", "q(1)", "q1", "[z]", "z", "k$", "k", "w*", "ww"],
    "no regexes": ["a(b", "a)b", "*c", "[d", "e\\", "?f", "f"],
}
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("names", CHAINS.values(), ids=CHAINS)
@torch.no_grad()
def test_each_site_has_its_own_rank_and_alpha_for_every_reader(names: list[str], tmp_path: Path) -> None:
    overrides = {f"re:{re.escape(name)}": {"rank": 1 + index % 4, "alpha": 2.0 + index} for index, name in enumerate(names)}
    model = Chain(names)
    adapter = tg.apply(model, "lora", ["@all"], rank=1, overrides=overrides)
    models.perturb_(adapter.parameters())
    adapter.save(tmp_path)
    (tmp_path / "torchgraft.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_bytes())
    for order in (False, True):
        turned = {key: dict(sorted(config[key].items(), reverse=order)) for key in ("rank_pattern", "alpha_pattern")}
        edit_config(tmp_path, **turned)
        again = Chain(names)
        tg.load(again, tmp_path)
        torch.testing.assert_close(again(X), model(X), **CLOSE)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(Chain(names), tmp_path)(X), model(X), **CLOSE)


@pytest.mark.parametrize("saved", [["head"], ["b.head"], ["head", "b.a"]], ids=" ".join)
@torch.no_grad()
def test_whole_modules_whose_names_end_alike_are_read_by_peft(saved: list[str], tmp_path: Path) -> None:
    """PEFT's modules_to_save are ends of names, and not even at a dot."""
    names = ["proj", "pre_head", "head", "bb.head", "b.head", "b.a", "bb.a"]
    model = Chain(names)
    adapter = tg.apply(model, "lora", ["proj"], rank=2, also_train=[f"re:{re.escape(name)}" for name in saved])
    models.perturb_(adapter.parameters())
    adapter.save(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Chain(names), tmp_path)(X), model(X), **CLOSE)
    for record in (tmp_path / "torchgraft.json", None):
        again = Chain(names)
        tg.load(again, tmp_path)
        torch.testing.assert_close(again(X), model(X), **CLOSE)
        if record:
            record.unlink()


@pytest.mark.parametrize("expression", [r".*\.(q|v)_proj", r"model\.layers\.(1|2|3)\..*", "(q)+_proj", r"[(+)]+x", r"\(a+\)+", "(a|b)?c"])
def test_other_expressions_are_matched(expression):
    assert peft_names.pattern_value({expression: 1}, "model.layers.0.self_attn.o_proj", 2) == 2
