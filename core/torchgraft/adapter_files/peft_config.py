"""The entries of PEFT's adapter_config.json, their types and their hash. What they mean for each layer is read in pairing/peft.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchgraft.errors import FileFormatError
from torchgraft.hashes import sha256_of_bytes

PEFT_LABELS = frozenset("auto_mapping base_model_name_or_path inference_mode peft_version revision task_type".split())


PEFT_TYPES = {
    "target_modules": str | list,
    "exclude_modules": str | list,
    "modules_to_save": list,
    "layers_pattern": str | list,
    "layers_to_transform": int | list,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "r": int,
    "lora_alpha": int | float,
    "lora_dropout": int | float,
    "use_rslora": bool,
    "use_dora": bool,
}
"""Types of the entries as PEFT writes them."""


NEEDED = ("r", "lora_alpha")
"""Entries that cannot be null."""


def meaning(peft: Mapping[str, Any]) -> str:
    """Return a hash of the entries that determine the adapter's function; names, versions and unset values are not hashed."""
    hashed = {key: value for key, value in sorted(peft.items()) if value and key not in PEFT_LABELS}
    return sha256_of_bytes(json.dumps(hashed, sort_keys=True).encode())


def check_peft_config(path: Path, peft: Mapping[str, Any]) -> None:
    """Check the types of the entries.

    Raises:
        FileFormatError: an entry has a type that PEFT does not write.
    """
    for key, expected in PEFT_TYPES.items():
        value = peft.get(key)
        names = value if isinstance(value, list) and key != "layers_to_transform" else []
        sound = (
            isinstance(value, expected) and (type(value) is not bool or expected is bool) and all(isinstance(name, str) for name in names)
        )
        if not sound and (value is not None or (key in NEEDED and key in peft)):
            raise FileFormatError(f"{path}: {key} = {value!r} is not what PEFT writes there")
