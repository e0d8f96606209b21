"""What tests of several folders compare with."""

from __future__ import annotations

from pathlib import Path


def tree(folder: Path) -> dict[str, object]:
    """Every file, directory and link below `folder`, hidden ones too: name → its bytes, None, or where it leads."""
    return {
        path.relative_to(folder).as_posix(): path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
