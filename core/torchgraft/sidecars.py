"""The files beside a checkpoint's weights: tokenizer, configs, code. They belong to the result of a merge."""

from __future__ import annotations

import hashlib
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from torchgraft.checkpoint import Checkpoint

RECORD = "torchgraft_merge.json"
UNDO = "torchgraft_undo"

OTHER_WEIGHTS = [
    "*.safetensors",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "rust_model.ot",
    "model.ckpt*",
    "consolidated*.pth",
    "*.gguf",
    "*.onnx",
]
"""The same weights in other forms. Carried along they would be stale: the merge does not change them."""
OTHER_DIRECTORIES = frozenset({"onnx", "openvino", "original", "coreml", ".git", ".cache"})


def sidecars(checkpoint: Checkpoint) -> tuple[list[Path], list[Path]]:
    """The files to carry along and those to leave out, relative to the directory. A single file has none."""
    if not checkpoint.root.is_dir():
        return [], []
    weights = {header.path for header in checkpoint.headers}
    carried: list[Path] = []
    left_out: list[Path] = []
    for path in sorted(checkpoint.root.rglob("*")):
        relative = path.relative_to(checkpoint.root)
        if path in weights or not path.is_file() or relative.parts[0] in (RECORD, UNDO):
            continue
        (left_out if _is_other_form(relative) else carried).append(relative)
    return carried, [path for path in left_out if not path.parts[0].startswith(".")]


def copy_into(source: Path, target: Path) -> None:
    """Copy one file (the content of a link), with the directories above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_other_form(relative: Path) -> bool:
    if relative.parts[0] in OTHER_DIRECTORIES:
        return len(relative.parts) > 1
    return len(relative.parts) == 1 and any(fnmatchcase(relative.name, pattern) for pattern in OTHER_WEIGHTS)
