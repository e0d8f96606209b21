"""Merge with PEFT: `python merge_peft.py MODEL ADAPTER OUT BYTES`, with at most BYTES in each file."""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(model: str, adapter: str, out: str, shard: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out, max_shard_size=int(shard))


if __name__ == "__main__":
    main(*sys.argv[1:])
