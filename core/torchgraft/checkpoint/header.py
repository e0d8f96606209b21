"""Read the header of a safetensors file as JSON and check it in full, without torch and without reading tensor data.

A file is an unsigned 64-bit length N (little endian), N bytes of JSON, then the data. The JSON maps each tensor's name
to its dtype, shape and [begin, end) within the data. The data must be covered without gap or overlap.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from operator import itemgetter
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

from torchgraft import dtypes
from torchgraft.errors import FileFormatError

MAX_HEADER = 100_000_000
"""Largest header in bytes: the limit of the safetensors library."""
BEYOND = 1 << 64
LFS = b"version https://git-lfs"
"""Start of the text file that git stores instead of a large file."""
SHOWN = 200
"""Characters of a name or value shown in a message, because a broken header can contain very long ones."""


class TensorEntry(NamedTuple):
    """One tensor's place in a file; `begin` and `end` are absolute byte offsets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header."""

    path: Path
    raw: bytes
    """The length field and the JSON, as stored at the start of the file."""
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]

    @cached_property
    def in_file_order(self) -> list[TensorEntry]:
        return sorted(self.tensors.values(), key=itemgetter(3, 4))  # begin and end


def read_header(path: Path, *, alone: bool = False) -> Header:
    """Read and check the header of `path`.

    Args:
        alone: the file contains only a header, without tensor data.

    Raises:
        FileFormatError: the file is missing, truncated, or not valid safetensors.
    """
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):  # opening a pipe would block
            raise FileFormatError(f"{path}: cannot be read: not a regular file")
        size = status.st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == LFS[:8] and file.read(len(LFS) - 8) == LFS[8:]:
                raise _broken(path, "it is a Git LFS pointer, not the weights; fetch them with 'git lfs pull', or download the file itself")
            if len(start) < 8:
                raise _broken(path, f"it has {size} bytes, and the header's length alone takes 8")
            if length > MAX_HEADER:
                raise _broken(path, f"its header claims {length:,} bytes, more than the format's {MAX_HEADER:,}")
            if 8 + length > size:
                raise _broken(path, f"its header claims {length:,} bytes, but only {size - 8:,} follow: is it truncated?")
            body = file.read(length)
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from error
    tensors, metadata = _parse(path, body, data_start=8 + length)
    header = Header(path, start + body, tensors, metadata)
    _check_coverage(header, data_start=8 + length, size=None if alone else size)
    return header


def dump_header(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Return the length field and JSON for tensors stored one after the other: name → (torch dtype name, shape).

    Padded with spaces to a multiple of 8 bytes, as the safetensors library does, so that data is aligned.
    """
    codes = {name: code for code, name in dtypes.NAMES.items()}
    document: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + dtypes.nbytes(dtype, shape)
        document[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    body = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def _parse(path: Path, body: bytes, data_start: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    try:
        document = _strict_json(body.decode())  # Python's JSON would take other encodings
        "".join(_strings(document)).encode()  # raises for lone surrogates, which Python's JSON lets through
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON ({error}): is it a safetensors file?") from error
    if not isinstance(document, dict):
        raise _broken(path, "its header is not a JSON object: is it a safetensors file?")
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the library takes null, too
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its __metadata__ is not a map of strings")
    return {name: _entry(path, name, value, data_start) for name, value in document.items()}, metadata


def _strict_json(text: str) -> Any:
    """Parse JSON, refusing a name that occurs twice in an object (ValueError) and reading -0 as -1; Python accepts both.

    Python parses twice as fast without hooks, and in most headers counting colons replaces them: without a backslash every
    colon follows a name or is in a string, so a duplicate name that was dropped leaves one colon too many.
    """
    if "\\" not in text and "-0" not in text:
        document = json.loads(text)
        names = (
            len(document) + sum([len(value) for value in document.values() if isinstance(value, dict)]) if isinstance(document, dict) else 0
        )
        if text.count(":") == names + "".join(_strings(document)).count(":"):
            return document
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_int=lambda digits: -1 if digits == "-0" else int(digits))


def _strings(document: Any) -> Iterator[str]:
    """Yield the names of tensors, and the names and values of the metadata."""
    metadata = document.get("__metadata__") if isinstance(document, dict) else None
    yield from document if isinstance(document, dict) else ()
    for pair in metadata.items() if isinstance(metadata, dict) else ():
        yield from (text for text in pair if isinstance(text, str))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        code, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(shape, list):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise _broken(path, f"tensor {_shown(name)} lacks a dtype, a shape or its two data_offsets") from None
    if len(value) > 3:  # the library ignores further entries, but Python would accept invalid JSON in them
        raise _broken(path, f"tensor {_shown(name)} has more than a dtype, a shape and data_offsets, which is all that the format allows")
    for number in (*shape, begin, end):
        if type(number) is not int or not 0 <= number < BEYOND:
            what = "has a shape or an offset that is not a whole number from 0 to 2⁶⁴"
            raise _broken(path, f"tensor {_shown(name)} {what}: {_shown(shape)}, {_shown([begin, end])}")
    if not isinstance(code, str) or code not in dtypes.NAMES:
        raise _broken(path, f"tensor {_shown(name)} has the dtype {_shown(code)}, which torchgraft does not know")
    dtype = dtypes.NAMES[code]
    bits = 1
    for number in (*shape, dtypes.BITS[dtype]):
        bits *= number
        if bits >= BEYOND:  # even if a zero follows, as in the library; also bounds the product
            raise _broken(path, f"tensor {_shown(name)} has the shape {_shown(shape)}, whose size is beyond 64 bits")
    if bits % 8:
        raise _broken(path, f"tensor {_shown(name)} takes {bits:,} bits as {code} {_shown(shape)}, which are not whole bytes")
    if end - begin != bits // 8:
        what = f"takes {bits // 8:,} bytes as {code} {_shown(shape)}, but its offsets span {end - begin:,}"
        raise _broken(path, f"tensor {_shown(name)} {what}")
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _check_coverage(header: Header, data_start: int, size: int | None) -> None:
    position = data_start
    for entry in header.in_file_order:
        if entry.begin != position:
            what = "overlaps the one before it" if entry.begin < position else "leaves a gap before it"
            raise _broken(
                header.path, f"tensor {_shown(entry.name)} {what} (offset {entry.begin - data_start:,}, expected {position - data_start:,})"
            )
        position = entry.end
    if size is not None and position != size:
        what = "is it truncated?" if position > size else "something was appended"
        raise _broken(header.path, f"its header describes {position:,} bytes, the file has {size:,}: {what}")


def _broken(path: Path, why: str) -> FileFormatError:
    return FileFormatError(f"{os.fspath(path)}: {why}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
