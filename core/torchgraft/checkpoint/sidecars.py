"""Collect the files beside a checkpoint's weights (tokenizer, configs, code), which a merge copies."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torchgraft.checkpoint.reading import Checkpoint
from torchgraft.checkpoint.tokenizers import matches, of_adapters, override
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
"""Patterns of files with the same weights in other forms. The merge does not change them, so copies would be stale."""
OTHER_DIRECTORIES = ("onnx", "openvino", "original", "coreml", "checkpoint-*", ".git", ".cache")

OF_ADAPTER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "torchgraft.json",
    "torchgraft.safetensors",
    "torchgraft_state.safetensors",
)
"""Files of an adapter. Beside a model's weights, they would make transformers load the adapter on top of them."""
TRAINED = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.npz")
OF_TRAINER = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "training_args.bin")
"""Files that a training loop resumes from."""


@dataclass(frozen=True)
class Sidecars:
    """The files to copy to the output of a merge."""

    files: Mapping[str, Path]
    """Name in the output, with slashes → the file that is copied there."""
    left_out: tuple[str, ...]
    """Files of the base that are not copied because they contain the same weights in another form."""
    of_adapter: tuple[str, ...]
    """Files of the base that are not copied because they are those of an adapter."""
    from_adapter: tuple[str, ...]
    """Names in `files` that come from an adapter and are missing or different in the base."""
    dropped: tuple[str, ...]
    """Files of the base that an adapter's files override."""
    own: Mapping[str, Path]
    """The adapters' files that can replace the base's, by name."""
    base: Mapping[str, Path]
    """Files of the base that unmerging restores, the record of an earlier merge included."""


def sidecars_of(checkpoint: Checkpoint, adapters: Iterable[Path] = ()) -> Sidecars:
    """Return the files to copy (none for a single file). An adapter's tokenizer, chat template and processor replace the base's."""
    if not checkpoint.root.is_dir():
        return Sidecars({}, (), (), (), (), {}, _earlier(checkpoint.directory))
    base, left_out = _of_base(checkpoint)
    of_adapter = {name: base.pop(name) for name in OF_ADAPTER if name in base}
    own = of_adapters(adapters)
    found = override(base, own)
    restored = {**base, **of_adapter, **_earlier(checkpoint.root)}
    return Sidecars(found.files, left_out, tuple(of_adapter), found.from_adapter, found.dropped, own, restored)


def other_trained_files(adapter: Path) -> list[str]:
    """Return the names of the files in an adapter's directory that contain weights and are not its own, such as a trained projector."""
    return sorted(
        path.name
        for path in adapter.iterdir()
        if path.is_file() and matches(path.name, TRAINED) and path.name not in OF_ADAPTER and not matches(path.name, OF_TRAINER)
    )


def _of_base(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    weights = {header.path for header in checkpoint.headers}
    carried: dict[str, Path] = {}
    left_out: list[str] = []
    for path in _files(checkpoint.root):
        relative = path.relative_to(checkpoint.root)
        if path in weights or relative.parts[0] in (RECORD, UNDO):
            continue
        if not _is_unicode(path.name):
            raise FileFormatError(f"{path}: the name of this file is not valid UTF-8; rename it")
        if not path.exists():
            raise FileFormatError(f"{path}: a link to a missing file; download or copy it again")
        if relative.as_posix() in OF_ADAPTER or not _is_other_form(relative):
            carried[relative.as_posix()] = path
        elif not relative.parts[0].startswith("."):
            left_out.append(str(relative))
    return carried, tuple(left_out)


def _earlier(root: Path) -> dict[str, Path]:
    """Return the record files of an earlier merge."""
    found = (root / RECORD, *sorted((root / UNDO).rglob("*")))  # includes those of still earlier merges
    return {path.relative_to(root).as_posix(): path for path in found if path.is_file()}


def _files(root: Path) -> list[Path]:
    """List every file, following links as in a hub's cache; directories of other merges, complete or partial, are skipped."""
    found: list[Path] = []
    seen = {os.path.realpath(root)}
    for directory, inside, names in os.walk(root, followlinks=True, onerror=_raise):
        if Path(directory) != root and RECORD in names:
            inside.clear()
            continue
        found += [Path(directory) / name for name in names]
        entered = []
        for name in sorted(inside):
            real = os.path.realpath(Path(directory) / name)
            if real not in seen and not fnmatchcase(name, ".*.partial"):  # links can lead in a circle
                seen.add(real)
                entered.append(name)
        inside[:] = entered
    return sorted(found)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _raise(error: OSError) -> None:
    raise error


def _is_other_form(relative: Path) -> bool:
    if len(relative.parts) > 1:
        return matches(relative.parts[0], OTHER_DIRECTORIES)
    return matches(relative.name, OTHER_WEIGHTS)
