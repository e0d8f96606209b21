"""Write files and directories so that each is complete or absent, and read JSON."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from torchgraft.errors import FileFormatError, TorchgraftWarning

LONG = re.compile(r"\d{19}")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Progress = Callable[[int, int], None]
"""A callback (bytes just written, bytes in total)."""


def silent(_written: int, _total: int) -> None:
    """Report no progress."""


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `target`. It is renamed to `target` when the block succeeds, and deleted when it fails.

    Raises:
        FileFormatError: `target` exists, or its parent cannot be written.
    """
    refuse_existing(target)
    _warn_of_left_over(target)
    made = [path for path in target.absolute().parents if not path.exists()]
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.absolute().parent))
    except OSError as error:
        raise FileFormatError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        yield temporary
        _sync_tree(temporary)
        temporary.chmod(0o777 & ~_umask())
        refuse_existing(target)
        temporary.rename(target)
    except BaseException as error:
        _remove(temporary)
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            what = f"{target}: cannot be written"
            if error.filename and not Path(os.fsdecode(error.filename)).is_relative_to(temporary):
                what = f"{os.fsdecode(error.filename)}: cannot be read"
            raise FileFormatError(f"{what}: {error.strerror or error}; nothing was left behind") from error
        raise
    with suppress(OSError):  # some file systems cannot sync a directory; its files are synced already
        _sync(target.absolute().parent)


def _remove(directory: Path) -> None:
    """Delete `directory`, and let a second interrupt through only afterwards."""
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def check_space(target: Path, needed: int) -> None:
    """Check that the disk of `target` has `needed` bytes free.

    Raises:
        FileFormatError: it has less.
    """
    if problem := space_problem(target, needed):
        raise FileFormatError(f"{target}: {problem}; free some, choose another output, or write no undo record (--no-undo)")


def space_problem(target: Path, needed: int) -> str:
    """Return the problem if the disk of `target` has less than `needed` bytes free, else an empty string."""
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    return f"the disk has {free:,} bytes free, and the result takes about {needed:,}" if free < needed else ""


def _warn_of_left_over(target: Path) -> None:
    """Warn of directories of killed runs, which could not clean up after themselves."""
    for path in sorted(target.absolute().parent.glob(f".{glob.escape(target.name)}.*.partial")):
        if path.is_symlink():  # not made by a run; it can lead anywhere
            continue
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        warnings.warn(
            f"{path}: left over from an interrupted run ({size:,} bytes); delete it if no merge is running",
            TorchgraftWarning,
            stacklevel=4,
        )


def refuse_existing(target: Path) -> None:
    """Check that nothing exists at `target`.

    Raises:
        FileFormatError: something does.
    """
    if target.exists() or target.is_symlink():
        raise FileFormatError(f"{target}: exists already; choose another output, or delete it first")


def refuse_inside(target: Path, source: Path) -> None:
    """Check that `target` is not inside the directory `source`.

    Raises:
        FileFormatError: it is.
    """
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise FileFormatError(f"{target}: inside {source}, which must not change; choose another output")


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` in one step: a reader sees the old content or the new."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)  # ranks may write at once
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def json_bytes(document: Any) -> bytes:
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode(errors="replace")  # a path can be no valid Unicode


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def copy_into(source: Path, target: Path) -> None:
    """Copy one file (of a link, its content) and its mode, and create the parent directories."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def read_json(path: Path, *, missing_ok: bool = False, any_text: bool = False) -> dict[str, Any]:
    """Return the JSON object in `path`; with `missing_ok`, an empty one if there is no such file.

    Args:
        any_text: accept strings that are not valid Unicode, as vocabularies can contain.

    Raises:
        FileFormatError: the file is missing, not a regular file or not a JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise FileFormatError(f"{path}: not a regular file")  # reading a pipe would block
        document = _parsed(path.read_bytes(), any_text)
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise FileFormatError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(document, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found a {type(document).__name__}")
    return document


def _parsed(data: bytes, any_text: bool) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not valid, a whole number has more than 64 bits, or a string has half of a surrogate pair.
    """
    text = data.decode(json.detect_encoding(data))
    document = json.loads(text, parse_int=_within_64_bits) if LONG.search(text) else json.loads(text)
    if not any_text and SURROGATE.search(text):
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string in it is not valid Unicode") from None
    return document


def _within_64_bits(digits: str) -> int:
    number = int(digits)
    if abs(number) >= 1 << 64:
        raise ValueError(f"the number {digits[:20]}… has more than 64 bits")
    return number


def leaves_directory(name: str) -> bool:
    """Whether the relative path `name`, read from a file, leads out of its directory."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name
