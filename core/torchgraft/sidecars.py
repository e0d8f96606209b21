"""The files beside a checkpoint's weights: tokenizer, configs, code. They belong to the result of a merge."""

from __future__ import annotations

import hashlib
import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from torchgraft.checkpoint import Checkpoint
from torchgraft.errors import FileFormatError

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
OTHER_DIRECTORIES = ("onnx", "openvino", "original", "coreml", "checkpoint-*", ".git", ".cache")


def sidecars(checkpoint: Checkpoint) -> tuple[list[Path], list[Path]]:
    """The files to carry along and those to leave out, relative to the directory. A single file has none."""
    if not checkpoint.root.is_dir():
        return [], []
    weights = {header.path for header in checkpoint.headers}
    carried: list[Path] = []
    left_out: list[Path] = []
    for path in _files(checkpoint.root):
        relative = path.relative_to(checkpoint.root)
        if path in weights or relative.parts[0] in (RECORD, UNDO):
            continue
        if not path.exists():
            raise FileFormatError(f"{path}: a link to a file that is not there; download or copy it again")
        (left_out if _is_other_form(relative) else carried).append(relative)
    return carried, [path for path in left_out if not path.parts[0].startswith(".")]


def _files(root: Path) -> list[Path]:
    """Every file, also in directories that are links, as in a hub's cache."""
    return sorted(Path(directory) / name for directory, _, names in os.walk(root, followlinks=True) for name in names)


def copy_into(source: Path, target: Path) -> None:
    """Copy one file (the content of a link), with the directories above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_other_form(relative: Path) -> bool:
    if len(relative.parts) > 1 and any(fnmatchcase(relative.parts[0], pattern) for pattern in OTHER_DIRECTORIES):
        return True
    return len(relative.parts) == 1 and any(fnmatchcase(relative.name, pattern) for pattern in OTHER_WEIGHTS)
