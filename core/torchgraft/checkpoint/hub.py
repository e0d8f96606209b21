"""Find a checkpoint: a path, or a hub id in the local cache, else downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from torchgraft.errors import FileFormatError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(source: str | Path) -> Path:
    """Return the path that `source` names; a hub id is looked up in the local cache, then downloaded."""
    path = Path(source)
    if path.exists():
        return path
    if not (isinstance(source, str) and HUB_ID.fullmatch(source)) or path.parent.exists():
        raise FileFormatError(f"{source}: no such file or directory")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise FileFormatError(f"{source}: no such file or directory; to use a hub id, install torchgraft[hf]") from None
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, local_files_only=True))
    except HFValidationError:
        raise FileFormatError(f"{source}: no such file or directory") from None
    except LocalEntryNotFoundError:
        return _download(source, patterns)


def _download(source: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileFormatError(f"{source}: no such file or directory, and no such hub id could be fetched ({reason})") from error
