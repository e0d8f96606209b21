"""Collect the files beside a checkpoint's weights (tokenizer, configs, code), which a merge copies."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torchgraft.checkpoint.reading import Checkpoint
from torchgraft.disk import read_json
from torchgraft.errors import FileFormatError, MergeError

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

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
OF_ADAPTER = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
]
"""Patterns of files that training saves beside an adapter and the merged model needs: it may add tokens or a chat template."""


@dataclass(frozen=True)
class Sidecars:
    """The files to copy to the output of a merge."""

    files: Mapping[str, Path]
    """Name in the output, with slashes → the file that is copied there."""
    left_out: tuple[str, ...]
    """Files of the base that are not copied because they contain the same weights in another form."""
    from_adapter: tuple[str, ...]
    """Names in `files` that come from an adapter and are missing or different in the base."""
    dropped: tuple[str, ...]
    """Files of the base that an adapter's files override."""
    base: Mapping[str, Path]
    """Files of the base that unmerging restores, the record of an earlier merge included."""


def sidecars_of(checkpoint: Checkpoint, adapters: Iterable[Path] = ()) -> Sidecars:
    """Return the files to copy (none for a single file). An adapter's tokenizer, chat template and processor replace the base's."""
    if not checkpoint.root.is_dir():
        return Sidecars({}, (), (), (), _earlier(checkpoint.directory))
    base, left_out = _of_base(checkpoint)
    files, own = dict(base), _of_adapters(adapters)
    changed = {name: path for name, path in own.items() if name not in base or not filecmp.cmp(path, base[name], shallow=False)}
    files.update(changed)
    dropped: tuple[str, ...] = ()
    if TOKENIZER_CONFIG in changed and TEMPLATE in base and TEMPLATE not in own and read_json(own[TOKENIZER_CONFIG]).get("chat_template"):
        del files[TEMPLATE]  # it would take precedence over the one in the adapter's config
        dropped = (TEMPLATE,)
    return Sidecars(files, left_out, tuple(changed), dropped, {**base, **_earlier(checkpoint.root)})


def _of_adapters(adapters: Iterable[Path]) -> dict[str, Path]:
    """Return the adapters' own files.

    Raises:
        MergeError: two adapters have different files of one name.
    """
    own: dict[str, Path] = {}
    for directory in adapters:
        for path in sorted(directory.iterdir()):
            if path.is_file() and _matches(path.name, OF_ADAPTER):
                other = own.setdefault(path.name, path)
                if not filecmp.cmp(path, other, shallow=False):
                    raise MergeError(f"{path}: it differs from {other}, and the merged model can have only one of them; remove the other")
    return own


def _of_base(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    weights = {header.path for header in checkpoint.headers}
    carried: dict[str, Path] = {}
    left_out: list[str] = []
    for path in _files(checkpoint.root):
        relative = path.relative_to(checkpoint.root)
        if path in weights or relative.parts[0] in (RECORD, UNDO):
            continue
        if not path.exists():
            raise FileFormatError(f"{path}: a link to a missing file; download or copy it again")
        if not _is_other_form(relative):
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


def _raise(error: OSError) -> None:
    raise error


def _is_other_form(relative: Path) -> bool:
    if len(relative.parts) > 1:
        return _matches(relative.parts[0], OTHER_DIRECTORIES)
    return _matches(relative.name, OTHER_WEIGHTS)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
