"""Compare a merged checkpoint with the formula: W + s·B·A in float64, rounded once to bfloat16.

`python merge_accuracy.py MODEL ADAPTER MERGED EVERY` prints JSON. Every EVERY-th adapted tensor is compared; 1 is all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

ROWS = 512
"""Rows of a tensor that are compared at a time."""
PREFIX, SUFFIX = "base_model.model.", ".lora_A.weight"


def main() -> None:
    model, adapter, merged = (Path(argument) for argument in sys.argv[1:4])
    print(json.dumps(compare(Files(model), Files(merged), adapter, int(sys.argv[4]))))


class Files:
    """Access to the tensors of all safetensors files of a directory."""

    def __init__(self, directory: Path) -> None:
        files: list[Any] = [safe_open(path, "pt") for path in sorted(directory.glob("*.safetensors"))]
        self.of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (it is no dict)

    def rows(self, name: str, at: slice) -> Tensor:
        found: Tensor = self.of[name].get_slice(name)[at]
        return found

    def blocks(self, name: str) -> Iterator[slice]:
        length = self.of[name].get_slice(name).get_shape()[0]
        return (slice(start, min(start + ROWS, length)) for start in range(0, length, ROWS))


def compare(base: Files, merged: Files, directory: Path, every: int) -> dict[str, Any]:
    """Count the entries of the adapted tensors that equal the rounded reference, and compare the other tensors bit for bit."""
    adapter, config = Files(directory), json.loads((directory / "adapter_config.json").read_text())
    sites = [name.removeprefix(PREFIX).removesuffix(SUFFIX) for name in adapter.of if name.endswith(SUFFIX)]
    entries, steps, errors = 0, [torch.zeros(1)], [torch.zeros(1)]
    for site in sites[::every]:
        a, b = (adapter.rows(f"{PREFIX}{site}.lora_{letter}.weight", slice(None)).double() for letter in "AB")
        name, s = f"{site}.weight", config["lora_alpha"] / config["r"]
        for at in base.blocks(name):
            before, found = base.rows(name, at), merged.rows(name, at)
            expected = rounded_once(before.double() + s * (b[at] @ a))
            missed = found.view(torch.int16) != expected.view(torch.int16)
            entries += found.numel()
            steps.append(ulps(found[missed], expected[missed]))
            larger = torch.maximum(before.abs(), expected.abs())[missed]
            errors.append((found[missed].double() - expected[missed].double()).abs() / unit(larger))
    others = base.of.keys() - {f"{site}.weight" for site in sites}
    same = all(base.rows(name, at).equal(merged.rows(name, at)) for name in others for at in base.blocks(name))
    return {
        "adapted": len(sites),
        "compared": len(sites[::every]),
        "entries": entries,
        "equal": entries - sum(map(len, steps[1:])),
        "beyond_one_ulp": int((torch.cat(steps) > 1).sum()),
        "largest_ulps": int(torch.cat(steps).max()),
        "largest_error": float(torch.cat(errors).max()),
        "others_unchanged": same and base.of.keys() == merged.of.keys(),
    }


def rounded_once(value: Tensor) -> Tensor:
    """Round float64 to bfloat16, to nearest and ties to even.

    Rounding to float32 first would round twice. So the value is rounded to odd in float32: toward 0, with the last bit set if
    anything was lost. float32 has 24 bits, more than the 8 + 2 for which the second rounding is then correct: Boldo and Melquiond, 2008,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".
    """
    near = value.float()
    away = near.double().abs() > value.abs()
    toward = (near.view(torch.int32) - away.int()).view(torch.float32)
    lost = toward.double() != value
    return (toward.view(torch.int32) | lost.int()).view(torch.float32).bfloat16()


def ulps(one: Tensor, other: Tensor) -> Tensor:
    """Return the distance between entries in bfloat16 numbers, where -0 and 0 are the same number."""
    return (_places(one) - _places(other)).abs()


def unit(value: Tensor) -> Tensor:
    """Return the distance from each value to the next bfloat16 number, which has 8 bits."""
    return torch.ldexp(torch.ones(value.shape, dtype=torch.float64), torch.frexp(value.float()).exponent - 8)


def _places(value: Tensor) -> Tensor:
    """Return each number's position among all bfloat16 numbers; the bits are a sign and a magnitude."""
    bits = value.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


if __name__ == "__main__":
    main()
