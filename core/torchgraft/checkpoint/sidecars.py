"""The files beside a checkpoint's weights: tokenizer, configs, code. They belong to the result of a merge."""

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
"""The same weights in other forms. Carried along they would be stale: the merge does not change them."""
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
"""What training saves beside an adapter and the merged model needs: it may have tokens or a chat template of its own."""


@dataclass(frozen=True)
class Sidecars:
    files: Mapping[str, Path]
    """Name in the output, with slashes → the file that is copied there."""
    left_out: tuple[str, ...]
    """The base's, for they hold the same weights in another form."""
    from_adapter: tuple[str, ...]
    """Which of `files` are an adapter's and not, or not so, the base's."""
    dropped: tuple[str, ...]
    """The base's that an adapter's make void."""
    base: Mapping[str, Path]
    """Those of the base that belong to it, the record of an earlier merge included: what unmerging gives back."""


def sidecars_of(checkpoint: Checkpoint, adapters: Iterable[Path] = ()) -> Sidecars:
    """The files to carry along; a single file has none. An adapter's tokenizer, chat template and processor replace the base's."""
    if not checkpoint.root.is_dir():
        return Sidecars({}, (), (), (), _earlier(checkpoint.directory))
    base, left_out = _of_base(checkpoint)
    files, own = dict(base), _of_adapters(adapters)
    changed = {name: path for name, path in own.items() if name not in base or not filecmp.cmp(path, base[name], shallow=False)}
    files.update(changed)
    dropped: tuple[str, ...] = ()
    if TOKENIZER_CONFIG in changed and TEMPLATE in base and TEMPLATE not in own and read_json(own[TOKENIZER_CONFIG]).get("chat_template"):
        del files[TEMPLATE]  # it would be taken before the one in the adapter's config
        dropped = (TEMPLATE,)
    return Sidecars(files, left_out, tuple(changed), dropped, {**base, **_earlier(checkpoint.root)})


def _of_adapters(adapters: Iterable[Path]) -> dict[str, Path]:
    """
    Raises:
        MergeError: two adapters bring different files of one name.
    """
    own: dict[str, Path] = {}
    for directory in adapters:
        for path in sorted(directory.iterdir()):
            if path.is_file() and _matches(path.name, OF_ADAPTER):
                other = own.setdefault(path.name, path)
                if not filecmp.cmp(path, other, shallow=False):
                    raise MergeError(f"{path}: it is not the same as {other}, and only one of them can go with the model; remove the other")
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
            raise FileFormatError(f"{path}: a link to a file that is not there; download or copy it again")
        if not _is_other_form(relative):
            carried[relative.as_posix()] = path
        elif not relative.parts[0].startswith("."):
            left_out.append(str(relative))
    return carried, tuple(left_out)


def _earlier(root: Path) -> dict[str, Path]:
    """What an earlier merge wrote of itself."""
    found = (root / RECORD, *sorted((root / UNDO).rglob("*")))  # with those of still earlier merges in it
    return {path.relative_to(root).as_posix(): path for path in found if path.is_file()}


def _files(root: Path) -> list[Path]:
    """Every file, also in directories that are links, as in a hub's cache. Not in those that hold another merge, whole or begun."""
    found: list[Path] = []
    seen = {os.path.realpath(root)}
    for directory, inside, names in os.walk(root, followlinks=True, onerror=_raise):
        if Path(directory) != root and RECORD in names:
            inside.clear()
            continue
        found += [Path(directory) / name for name in names]
        kept = []
        for name in sorted(inside):
            real = os.path.realpath(Path(directory) / name)
            if real not in seen and not fnmatchcase(name, ".*.partial"):  # links can lead in a circle
                seen.add(real)
                kept.append(name)
        inside[:] = kept
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _is_other_form(relative: Path) -> bool:
    if len(relative.parts) > 1:
        return _matches(relative.parts[0], OTHER_DIRECTORIES)
    return _matches(relative.name, OTHER_WEIGHTS)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
