"""Count the entries of the base that are restored bit for bit by merging and unmerging in memory, with torchgraft and with PEFT.

Run it with `make bench`; it takes seconds. It writes unmerge.json, from which comparison.py makes a row of the README's table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from merge import HERE, machine, versions
from speed_rows import ALPHA, LINEARS, RANK, base
from torch import Tensor, nn

import torchgraft as tg

HIDDEN, LAYERS, SPREAD = 1024, 2, 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=HERE, help="where the results are written")
    arguments = parser.parse_args()
    results = {"machine": machine(Path(tempfile.gettempdir())), "versions": versions(), "hidden": HIDDEN, "layers": LAYERS, **measure()}
    (arguments.directory / "unmerge.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {arguments.directory / 'unmerge.json'}")


def measure() -> dict[str, Any]:
    """Merge and unmerge one LoRA adapter on all linear layers of a Llama-shaped model in bfloat16, with both libraries."""
    weights = adapted_weights(model())
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, init_lora_weights=False)
    with_peft = peft.get_peft_model(model(), config)
    for name, parameter in with_peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=SPREAD)
    with tempfile.TemporaryDirectory() as directory:
        with_peft.save_pretrained(directory)
        with_torchgraft = model()
        adapter = tg.load(with_torchgraft, directory)
    with_peft.merge_adapter()
    with_peft.unmerge_adapter()
    adapter.merge()
    adapter.unmerge()
    return {
        "entries": sum(weight.numel() for weight in weights),
        "torchgraft": equal_entries(weights, adapted_weights(with_torchgraft)),
        "PEFT": equal_entries(weights, adapted_weights(with_peft)),
    }


def model() -> nn.Module:
    return base(HIDDEN, LAYERS, 32, torch.bfloat16)


def adapted_weights(model: nn.Module) -> list[Tensor]:
    """Return copies of the adapted weights, in the order of the model's layers."""
    endings = tuple(f"{layer}{inner}.weight" for layer in LINEARS for inner in ("", ".base_layer"))
    return [parameter.detach().clone() for name, parameter in model.named_parameters() if name.endswith(endings)]


def equal_entries(before: list[Tensor], after: list[Tensor]) -> int:
    """Count the entries with the same bits."""
    pairs = zip(before, after, strict=True)
    return sum(int((one.view(torch.int16) == other.view(torch.int16)).sum()) for one, other in pairs)


if __name__ == "__main__":
    main()
