"""The record of an adapter, torchgraft.json: its entries, validated when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from torchgraft.errors import FileFormatError

FORMAT = 1
SHOWN = 60
"""Characters of an invalid value in a message."""


class Entry(BaseModel):
    """One JSON object of the record. Unknown keys are ignored, because later versions may add some."""

    model_config = ConfigDict(frozen=True, strict=True)


E = TypeVar("E", bound=Entry)


class MethodRecord(Entry):
    """The method, and the distribution that provided it."""

    name: str
    distribution: str | None = None
    version: str | None = None


class TensorsRecord(Entry):
    """Name and SHA-256 of the file that holds the adapter's tensors."""

    file: Literal["adapter_model.safetensors", "torchgraft.safetensors"]
    sha256: str


class StateRecord(Entry):
    """The method's state: plain values, and the hash of the file that holds its tensors ("" if there are none)."""

    values: dict[str, Any]
    sha256: str


class SiteRecord(Entry):
    """One site: the layer that the adapter was trained on, and its options."""

    name: str
    kind: str
    shape: Annotated[tuple[StrictInt, ...], Field(strict=False)]
    dtype: str
    config: dict[str, Any]
    """Options that differ from those of the whole adapter."""
    bias: bool | None = None
    """Whether the layer has a bias; None if it was not recorded."""
    groups: Annotated[int, Field(gt=0)] = 1
    fingerprint: str = ""
    beneath: list[str] = []
    """Names of the earlier adapters on the layer, for a method that depends on the weight."""
    quantization: dict[str, Any] = {}


class AdapterRecord(Entry):
    """The whole record."""

    method: MethodRecord
    config: dict[str, Any]
    sites: list[SiteRecord]
    also_train: list[str]
    also_saved: list[str] = []
    tensors: TensorsRecord
    base: str | None = None
    shared: dict[str, Any] = {}
    """Digests of the tensors that the sites share."""
    quantized: dict[str, dict[str, Any]] = {}
    """Further quantized layers of the base, and how they were quantized."""
    state: StateRecord = StateRecord(values={}, sha256="")
    peft_config: str | None = None
    """Hash of the PEFT config that was written beside the record."""


def parse_record(path: Path, document: Mapping[str, Any]) -> AdapterRecord:
    """Validate the JSON object that was read from `path`.

    Raises:
        FileFormatError: a later version wrote it, or an entry is missing or invalid.
    """
    if document.get("format") != FORMAT:
        raise FileFormatError(f"{path}: format {document.get('format')!r}; this version reads {FORMAT}: upgrade torchgraft")
    return validated(AdapterRecord, path, document)


def validated(model: type[E], path: Path, document: Mapping[str, Any]) -> E:
    """Return `document`, which was read from `path`, as a `model`.

    Raises:
        FileFormatError: an entry is missing or invalid; names the first one.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).removeprefix(".")
    if first["type"] == "missing":
        raise FileFormatError(f"{path}: invalid record: {where} is missing")
    found = repr(first["input"])
    found = found if len(found) <= SHOWN else f"{found[:SHOWN]}…"
    raise FileFormatError(f"{path}: invalid record: {where}: {first['msg'].lower()}, found {found}")
