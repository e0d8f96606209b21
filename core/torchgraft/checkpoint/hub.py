"""Find a checkpoint: a path, or a hub id in the local cache, else downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from torchgraft.errors import FileFormatError

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""Owner, name and, after @, a revision."""
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "adapter_model.bin"]


def locate(source: str | Path) -> Path:
    """Return the path that `source` names; a hub id, OWNER/NAME or OWNER/NAME@REVISION, is looked up in the local cache, then downloaded.

    Raises:
        FileFormatError: there is no such path, and no such hub id.
    """
    path = Path(source)
    if path.exists():
        return path
    hub_id = HUB_ID.fullmatch(str(source))
    if hub_id is None or path.parent.exists():
        raise FileFormatError(f"{source}: no such file or directory")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise FileFormatError(f"{source}: no such file or directory; to use a hub id, install torchgraft[hf]") from None
    name, revision = hub_id.groups()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS, local_files_only=True))
    except HFValidationError:
        raise FileFormatError(f"{source}: no such file or directory") from None
    except LocalEntryNotFoundError:
        return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"revision {revision} of the hub id {name}" if revision else "such hub id"
        raise FileFormatError(f"{name}: no such file or directory, and no {what} could be fetched ({reason})") from error
