"""Write a Llama-shaped checkpoint with random weights, and a LoRA adapter for it in PEFT's format.

`python llama_files.py CONFIG DIRECTORY` writes model/ and adapter/ into DIRECTORY; CONFIG is JSON with config.json's keys.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARDS, SEED = 5, 0
SPREAD = 0.02
"""Standard deviation of every weight, and of the adapter's B."""
RANK, ALPHA = 16, 32
Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    config, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
    write_model(config, directory / "model")
    write_adapter(directory / "model", directory / "adapter")


def write_model(config: Config, directory: Path) -> None:
    """Write the checkpoint with one shard in memory at a time."""
    directory.mkdir()
    rest = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(rest | config, indent=2) + "\n")
    generator = torch.Generator().manual_seed(SEED)
    places: dict[str, str] = {}
    for number, shapes in enumerate(shards(dict(tensors(config))), 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        save_file({name: weight(shape, generator) for name, shape in shapes.items()}, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shapes, file)
    size = sum(2 * prod(shape) for _, shape in tensors(config))
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def tensors(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor, in the order of the model."""
    hidden, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shared = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    block = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (shared, hidden), "self_attn.v_proj": (shared, hidden)}
    block |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)}
    block |= {"mlp.down_proj": (hidden, ffn)}
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(config["num_hidden_layers"]):
        for name, shape in (block | {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}).items():
            yield f"model.layers.{number}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def shards(shapes: Shapes) -> list[Shapes]:
    """Split the tensors into shards of about equal size."""
    total, begin = sum(map(prod, shapes.values())), 0
    found: list[Shapes] = [{} for _ in range(SHARDS)]
    for name, shape in shapes.items():
        found[begin * SHARDS // total][name] = shape
        begin += prod(shape)
    return found


def weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return random values around 0, or around 1 for the weights of norms."""
    return torch.randn(shape, generator=generator).mul_(SPREAD).add_(len(shape) == 1).bfloat16()


def write_adapter(model: Path, directory: Path) -> None:
    """Write an adapter on every linear layer of the blocks, with B not 0, as after training."""
    options = f"--plugin lora --rank {RANK} --alpha {ALPHA} --seed {SEED} --output".split()
    subprocess.run([Path(sys.executable).with_name("adapt"), "apply", model, *options, directory], check=True, stdout=subprocess.DEVNULL)
    path, generator = directory / "adapter_model.safetensors", torch.Generator().manual_seed(SEED)
    started = load_file(path)
    moved = {name: torch.randn(old.shape, generator=generator) * SPREAD if ".lora_B." in name else old for name, old in started.items()}
    save_file(moved, path, metadata={"format": "pt"})
    (directory / "torchgraft.json").unlink()  # its hash of the tensors is stale; the rest is PEFT's format


if __name__ == "__main__":
    main()
