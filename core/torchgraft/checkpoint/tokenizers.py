"""Decide which tokenizer, chat template and processor files a merged model gets: the adapter's or the base's.

Training saves these files beside an adapter, because it may add tokens or a chat template. A mixture of two tokenizers is
none, so the files replace each other as whole sets.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torchgraft.disk import read_json
from torchgraft.errors import MergeError

TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARY = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece*.model",
    "tekken.json",
    "*.tiktoken",
)
TOKENIZER = (*VOCABULARY, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt")
TEMPLATES = ("chat_template.*", "additional_chat_templates/*")
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class Overridden:
    """The files beside the weights, after those of the adapters replaced the base's."""

    files: Mapping[str, Path]
    """Name → the file."""
    from_adapter: tuple[str, ...]
    """Names that an adapter adds or changes."""
    dropped: tuple[str, ...]
    """Names of the base that belong to a set that an adapter replaces."""


def override(base: Mapping[str, Path], own: Mapping[str, Path]) -> Overridden:
    """Return the base's files, with the sets that `own`, the adapters' files, replace.

    The base's tokenizer is replaced as a whole if an adapter has another vocabulary, its chat templates if an adapter has another one,
    and its processors if an adapter has another processor_config.json, which contains all of them. Else single files are replaced.
    """
    changed = {name: path for name, path in own.items() if name not in base or not filecmp.cmp(path, base[name], shallow=False)}
    replaced = [
        *(TOKENIZER if _any(changed, VOCABULARY) else ()),
        *(TEMPLATES if _any(changed, TEMPLATES) or _template_in_config(changed) else ()),
        *(PROCESSOR if "processor_config.json" in changed else ()),
    ]
    dropped = tuple(name for name in base if name not in own and matches(name, replaced))
    return Overridden({name: path for name, path in {**base, **changed}.items() if name not in dropped}, tuple(changed), dropped)


def of_adapters(directories: Iterable[Path]) -> dict[str, Path]:
    """Return the adapters' own files, by their names in the output.

    Raises:
        MergeError: two adapters have different files of one name.
    """
    own: dict[str, Path] = {}
    for directory in directories:
        for path in sorted((*directory.iterdir(), *directory.glob("additional_chat_templates/*"))):
            name = path.relative_to(directory).as_posix()
            if path.is_file() and matches(name, (*TOKENIZER, *TEMPLATES, *PROCESSOR)):
                other = own.setdefault(name, path)
                if not filecmp.cmp(path, other, shallow=False):
                    raise MergeError(f"{path}: it differs from {other}, and the merged model can have only one of them; remove the other")
    return own


def refuse_more_ids(own: Mapping[str, Path], names: Iterable[str], rows: int) -> None:
    """Check that the input embedding has a row for every id of an adapter's tokenizer.

    Args:
        own: the adapters' files.
        names: those that differ from the base's.
        rows: rows of the input embedding in the output.

    Raises:
        MergeError: it has fewer rows.
    """
    for name in names:
        largest = _largest_id(own[name])
        if largest >= rows:
            raise MergeError(
                f"{own[name]}: this tokenizer has ids up to {largest}, and the input embedding has {rows} rows. Save the adapter with its "
                "resized embeddings, or remove the tokenizer from its directory, so that the base's is used"
            )


def _largest_id(path: Path) -> int:
    """Return the largest id in a vocabulary file, or -1."""
    if path.name == "vocab.txt":
        return len(path.read_bytes().splitlines()) - 1
    if path.name not in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        return -1
    document = read_json(path, any_text=True)
    if path.name != "tokenizer.json":
        return _largest(document.values())
    model, added = document.get("model"), document.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1] if isinstance(vocabulary, list) else []
    return max(_largest(found), _largest(token.get("id") for token in added or [] if isinstance(token, dict)))


def _largest(ids: Iterable[object]) -> int:
    return max((number for number in ids if isinstance(number, int)), default=-1)


def _template_in_config(files: Mapping[str, Path]) -> bool:
    return TOKENIZER_CONFIG in files and bool(read_json(files[TOKENIZER_CONFIG], any_text=True).get("chat_template"))


def _any(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(matches(name, patterns) for name in names)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
