"""Estimates of training memory, against sums written out by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import torchgraft as tg
from command import Result
from torchgraft.layers.training_memory import adapter_memory, full_memory, memory_of_methods

Adapt = Callable[..., Result]
LAYERS, HIDDEN, INNER, VOCABULARY, RANK = 32, 4096, 11008, 32000, 16
DENSE = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
OTHER = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
TRAINED = LAYERS * RANK * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER))
OUTPUTS = LAYERS * (5 * HIDDEN + 2 * INNER)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the layout of Llama-2-7B: a header, and a hole in the file where the weights would be."""
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "lm_head.weight": [VOCABULARY, HIDDEN]}
    for block in range(LAYERS):
        at = f"model.layers.{block}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": [HIDDEN, HIDDEN] for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": [INNER, HIDDEN] for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": [HIDDEN, INNER]}
        shapes |= {f"{at}.{name}.weight": [HIDDEN] for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = [HIDDEN]
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    directory = tmp_path_factory.mktemp("seven")
    encoded = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + place)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return directory


def inspected(adapt: Adapt, model: Path, *options: object) -> dict[str, dict[str, int]]:
    result = adapt("inspect", model, "--target", "@linear", "--json", *options)
    assert result.code == 0, result.err
    memory: dict[str, dict[str, int]] = json.loads(result.out)["memory"]
    return memory


def test_a_7b_model_fits_in_24_gigabytes_with_qlora_and_not_in_full(adapt: Adapt, seven_billion: Path) -> None:
    memory = inspected(adapt, seven_billion, "--plugin", "qlora", "-r", RANK)
    assert memory["full"]["total"] == 2 * (DENSE + OTHER) * 4 > 24e9
    weights = 2 * OTHER + DENSE * (4 + (8 + 32 / 256) / 64) / 8
    assert memory["qlora"]["weights"] == pytest.approx(weights, abs=1000)
    assert pytest.approx(4.127, abs=1e-3) == (4 + (8 + 32 / 256) / 64)
    assert memory["qlora"] == {
        "trainable": TRAINED,
        "weights": memory["qlora"]["weights"],
        "adapter": 4 * TRAINED,
        "gradients": 4 * TRAINED,
        "optimizer": 8 * TRAINED,
        "total": memory["qlora"]["weights"] + 16 * TRAINED,
    }
    assert memory["qlora"]["total"] < 24e9


def test_each_method_is_estimated_with_the_same_options(adapt: Adapt, seven_billion: Path) -> None:
    memory = inspected(adapt, seven_billion, "--plugin", "lora", "-r", RANK, "--set", "dtype=bfloat16")
    assert set(memory) == {"full", "adalora", "dora", "lora", "loraplus", "qlora"}
    for method in ("lora", "loraplus", "adalora"):
        assert memory[method]["trainable"] == TRAINED
        assert memory[method]["total"] == 2 * (DENSE + OTHER) + 8 * TRAINED
    assert memory["dora"]["trainable"] == TRAINED + OUTPUTS


def test_a_method_that_does_not_work_on_the_layers_is_left_out(adapt: Adapt, seven_billion: Path) -> None:
    result = adapt("inspect", seven_billion, "--target", "@embedding", "--plugin", "lora", "--json")
    assert "qlora" not in json.loads(result.out)["memory"]


def test_modules_that_are_trained_whole_count_as_a_copy(seven_billion: Path) -> None:
    head = VOCABULARY * HIDDEN
    plan = tg.plan(seven_billion, ["q_proj"], also_train=["lm_head"])
    hooks = tg.registry().hooks("lora")
    configs = dict.fromkeys((layer.name for layer in plan.sites), tg.LowRankConfig(rank=1))
    memory, own = adapter_memory(plan, hooks, configs), LAYERS * 2 * HIDDEN
    assert (memory.trainable, memory.adapter) == (own + head, 4 * own + 2 * head)
    assert (memory.gradients, memory.optimizer) == (memory.adapter, 2 * memory.adapter)


def test_pissa_keeps_two_more_matrices_that_are_not_trained(seven_billion: Path) -> None:
    plan = tg.plan(seven_billion, ["q_proj"])
    hooks = tg.registry().hooks("lora")
    config = tg.LowRankConfig(rank=4, init="pissa")
    memory = adapter_memory(plan, hooks, dict.fromkeys((layer.name for layer in plan.sites), config))
    assert memory.adapter == 2 * memory.gradients == 2 * 4 * memory.trainable


def test_the_total_of_full_training_is_four_times_the_weights(seven_billion: Path) -> None:
    plan = tg.plan(seven_billion, ["q_proj"])
    assert full_memory(plan).total == 4 * full_memory(plan).weights
    config = tg.LowRankConfig(rank=4)
    chosen = memory_of_methods(plan, tg.registry().hooks("lora"), dict.fromkeys((layer.name for layer in plan.sites), config), {"rank": 9})
    assert 9 * chosen["lora"].trainable == 4 * chosen["loraplus"].trainable, "the chosen method has its own configs"
