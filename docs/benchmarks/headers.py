"""Time and memory of `adapt` where it reads only headers: a file with 100,000 tensors, and a checkpoint of 405B parameters.

Run it with `make bench`; `--report` only rewrites headers.md from headers.json. The files are sparse and take a few dozen MB on disk.
Another process writes them, because the kernel counts the memory of this process as a lower bound for each process that it starts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from merge import ADAPT, HERE, Command, machine, run, versions
from merge_runs import middle

GIANT = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
GIANT |= {"num_key_value_heads": 8, "vocab_size": 128256}
"""Llama 3.1 405B."""
SHARD, RANK = 4_700_000_000, 16
EXPERTS, BLOCKS = 520, 64
"""With three matrices for each expert: 99,840 tensors, and 160 norms."""
Shapes = dict[str, tuple[int, ...]]

START, MANY, MANY_JSON = "python -c pass", "adapt inspect, 100,000 tensors", "adapt inspect --json, 100,000 tensors"
PLAN = "adapt merge --dry-run, 405B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=HERE, help="where the results are written")
    parser.add_argument("--generate", type=Path, help="only write the files, into this directory")
    parser.add_argument("--report", action="store_true", help="run nothing; write headers.md from headers.json")
    arguments = parser.parse_args()
    if arguments.generate:
        write_sparse(arguments.generate / "many.safetensors", dict(experts()))
        write_giant(arguments.generate)
        return
    if arguments.report:
        (arguments.directory / "headers.md").write_text(page(json.loads((arguments.directory / "headers.json").read_text())))
        return
    with tempfile.TemporaryDirectory(prefix="headers-bench-") as scratch:
        files = Path(scratch)
        run([sys.executable, __file__, "--generate", files])
        commands: dict[str, Command] = {
            START: [sys.executable, "-c", "pass"],
            MANY: [ADAPT, "inspect", files / "many.safetensors"],
            MANY_JSON: [ADAPT, "inspect", files / "many.safetensors", "--json"],
            PLAN: [ADAPT, "merge", files / "model", files / "adapter", "-o", files / "out", "--dry-run"],
        }
        runs = [{row: run(command)[0]._asdict() for row, command in commands.items()} for _ in range(arguments.repetitions + 1)][1:]
    results = {"machine": machine(Path(tempfile.gettempdir())), "versions": versions(), "runs": runs}
    (arguments.directory / "headers.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.directory / "headers.md").write_text(page(results))
    print(f"wrote {arguments.directory / 'headers.md'} and headers.json")


def experts() -> Iterator[tuple[str, tuple[int, ...]]]:
    for block, expert, matrix in product(range(BLOCKS), range(EXPERTS), ("w1", "w2", "w3")):
        yield f"model.layers.{block}.block_sparse_moe.experts.{expert}.{matrix}.weight", (14336, 4096)
    for number in range(160):
        yield f"model.layers.{number}.input_layernorm.weight", (4096,)


def write_sparse(path: Path, shapes: Shapes) -> None:
    from torchgraft.checkpoint.header import dump_header

    header = dump_header({name: ("bfloat16", shape) for name, shape in shapes.items()}, {"format": "pt"})
    size = sum(2 * int(shape[0]) * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def write_giant(files: Path) -> None:
    from llama_files import tensors

    (files / "model").mkdir()
    (files / "adapter").mkdir()
    shards: list[Shapes] = [{}]
    size, factors = 0, Shapes()
    for name, shape in tensors(GIANT):
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if size + nbytes > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
        if name.endswith("_proj.weight"):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{layer}.lora_A.weight": (RANK, shape[1]), f"{layer}.lora_B.weight": (shape[0], RANK)}
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shapes in zip(names, shards, strict=True):
        write_sparse(files / "model" / file, shapes)
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in zip(names, shards, strict=True) for name in shapes}}
    (files / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **GIANT}
    (files / "model" / "config.json").write_text(json.dumps(config))
    write_sparse(files / "adapter" / "adapter_model.safetensors", factors)
    targets = sorted({name.split(".")[-3] for name in factors})
    peft = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (files / "adapter" / "adapter_config.json").write_text(json.dumps(peft))


def page(results: dict[str, object]) -> str:
    from merge_report import table

    runs, found, versions_of = results["runs"], results["machine"], results["versions"]
    assert isinstance(runs, list)
    assert isinstance(found, dict)
    assert isinstance(versions_of, dict)
    lines = []
    for row in runs[0]:
        wall, peak = [one[row]["wall"] for one in runs], [one[row]["peak"] / 1e6 for one in runs]
        command, comma, case = row.partition(", ")
        lines.append([f"`{command}`{comma}{case}", middle(wall, ".2f"), middle(peak, ".0f")])
    return PAGE.format(
        machine=f"{found['cores']} cores of {found['cpu']}, {found['system']}",
        versions=", ".join(f"{name} {version}" for name, version in versions_of.items()),
        repetitions=len(runs),
        table=table(["command", "wall time, s", "peak memory, MB"], lines),
    )


PAGE = """\
<!-- written by make bench from headers.json -->
# Inspecting and planning on large checkpoints

Time and peak memory of `adapt inspect` on one safetensors file with 100,000 tensors (a mixture of experts), and of
`adapt merge --dry-run` on a checkpoint of the shape of Llama 3.1 405B in 191 files with a rank-16 LoRA on all linear layers of its
blocks. `python -c pass` is the baseline. These commands read headers and, at most, samples of the data, so the files are sparse.

Machine: {machine}. Versions: {versions}.

{table}

Each command is a process of its own. Figures are medians of {repetitions} runs, with minimum and maximum in brackets.
"""


if __name__ == "__main__":
    main()
