"""Our reader of safetensors headers against the safetensors library, on headers that are right and on headers that are not."""

from __future__ import annotations

import json
import random
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from safetensors.torch import save

from torchgraft import dtypes
from torchgraft.checkpoint.header import MAX_HEADER, Header, dump_header, read_header
from torchgraft.errors import FileFormatError

Tensors = dict[str, tuple[str, tuple[int, ...]]]

SLOW_IS_FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
SEVERAL, MANY = settings(SLOW_IS_FINE, max_examples=200), settings(SLOW_IS_FINE, max_examples=600)

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensors = st.dictionaries(names, st.tuples(st.sampled_from(sorted(dtypes.SIZES)), shapes), max_size=6)
metadata = st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that every example writes again."""
    return tmp_path_factory.mktemp("header") / "x.safetensors"


def library_reads(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Name → (dtype code, shape, bytes), or None if the library refuses the file."""
    try:
        return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        return None


def we_read(path: Path, data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """The same by our reader. Any other exception than FileFormatError is a failure of the test."""
    path.write_bytes(data)
    refusal = ""
    try:
        header = read_header(path)
    except FileFormatError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(f"{path}: ")
        return None
    codes = {name: code for code, name in dtypes.NAMES.items()}
    return {name: (codes[entry.dtype], entry.shape, data[entry.begin : entry.end]) for name, entry in header.tensors.items()}


def assert_no_laxer(path: Path, data: bytes) -> None:
    """What we accept, the library accepts too and reads alike."""
    ours = we_read(path, data)
    if ours is not None:
        assert ours == library_reads(data)


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def stored(data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.tensor(list(data), dtype=torch.uint8)
    return flat.view(dtypes.torch_dtype(dtype)).reshape(shape) if data else torch.empty(shape, dtype=dtypes.torch_dtype(dtype))


def size_of(layout: Tensors) -> int:
    return sum(prod(shape) * dtypes.SIZES[dtype] for dtype, shape in layout.values())


@SEVERAL
@given(tensors, metadata)
def test_library_reads_the_header_that_we_write(path: Path, layout: Tensors, notes: dict[str, str]) -> None:
    header, data = dump_header(layout, notes), noise(size_of(layout))
    assert len(header) % 8 == 0
    found = library_reads(header + data)
    assert found is not None
    assert {name: shape for name, (_, shape, _) in found.items()} == {name: shape for name, (_, shape) in layout.items()}
    assert {name: dtypes.NAMES[code] for name, (code, _, _) in found.items()} == {name: dtype for name, (dtype, _) in layout.items()}
    assert b"".join(found[name][2] for name in layout) == data
    path.write_bytes(header + data)
    with safetensors.safe_open(path, "numpy") as opened:
        assert (opened.metadata() or {}) == notes


@SEVERAL
@given(tensors, metadata)
def test_we_read_the_file_that_the_library_writes(path: Path, layout: Tensors, notes: dict[str, str]) -> None:
    contents = {name: noise(size_of({name: spec})) for name, spec in layout.items()}
    data = save({name: stored(contents[name], *spec) for name, spec in layout.items()}, notes or None)
    path.write_bytes(data)
    header = read_header(path)
    assert header.metadata == notes
    assert header.raw == data[: 8 + int.from_bytes(data[:8], "little")]
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == layout
    assert {name: data[entry.begin : entry.end] for name, entry in header.tensors.items()} == contents
    assert [entry.end for entry in header.in_file_order[:-1]] == [entry.begin for entry in header.in_file_order[1:]]


def test_dtypes_have_the_names_and_sizes_of_the_library(path: Path) -> None:
    for code, name in dtypes.NAMES.items():
        content = bytes(dtypes.nbytes(name, (3, 4)))
        assert library_reads(dump_header({"x": (name, (3, 4))}, {}) + content) == {"x": (code, (3, 4), content)}, name


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_shape_that_does_not_fill_whole_bytes_is_refused_as_by_the_library(path: Path, code: str) -> None:
    header = json.dumps({"x": {"dtype": code, "shape": [3], "data_offsets": [0, 2]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(2)
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="which are not whole bytes"):
        read_header(path)
    assert library_reads(data) is None


# A file as text with holes, each of which may be filled with something that the format does not allow.
GOOD = {
    "bom": b"",
    "name": '"w"',
    "dtype": '"F32"',
    "shape": "[2,1]",
    "begin": "0",
    "end": "8",
    "extra": "",
    "entry": '{{"dtype":{dtype},"shape":{shape},"data_offsets":[{begin},{end}]{extra}}}',
    "second": '"u":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}',
    "metadata": '{"format":"pt"}',
    "tail": "",
    "encoding": "utf-8",
    "data": bytes(8),
}
NUMBERS = ["-0", "0.0", "1", "8", "-1", "8e0", "true", "null", '"8"', "[8]", "{}", "018", "18446744073709551616", "9" * 5000, "NaN", "1_0"]
VALUES = [*NUMBERS, "[]", '""', "[[]]", "[" * 130 + "]" * 130, "[" * 9000 + "]" * 9000, "Infinity", "1e999", r'"\ud800"', "'F32'", "", "{"]
BAD: dict[str, list[Any]] = {
    "bom": [b"\xef\xbb\xbf", b"\xff\xfe", b" ", b"\n", b"\0", b"\xa0"],
    "name": [r'"\ud800"', '"\ud800"', '"__metadata__"', '""', "w", "1", '"\\x41"', '"a\nb"', '"u"', r'"\u0075"'],
    "dtype": [*VALUES, '"F31"', '"f32"', '"F16"', '"F64"', '"F32 "', '["F32"]'],
    "shape": [
        *VALUES,
        "[2,-0]",
        "[2.0]",
        "[2,1,]",
        "[-2,-1]",
        "[2,true]",
        '"21"',
        "[4611686018427387905,8,0]",
        "[0,4611686018427387905,8]",
    ],
    "begin": [*NUMBERS, "-8"],
    "end": [*NUMBERS, "0", "7", "9", "16", "9223372036854775807", "18446744073709551615"],
    "extra": [f',"x":{value}' for value in VALUES] + [",", ',"dtype":"F32"', ',"shape":[2]', "}", ',"x":1'],
    "entry": [
        *VALUES,
        '["F32",[2,1],[0,8]]',
        '{{"dtype":{dtype},"shape":{shape}}}',
        '{{"dtype":"F32","shape":[2,1],"data_offsets":[0,8,8]}}',
        '{{"dtype":"F64","shape":[],"data_offsets":[0,8]}}',
        '{{"dtype":"F64","shape":{{}},"data_offsets":[0,8]}}',
        '{{"dtype":"F64","shape":"","data_offsets":[0,8]}}',
        '{{"dtype":"F64","shape":null,"data_offsets":[0,8]}}',
    ],
    "second": [
        '"u":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',
        '"u":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}',
        '"u":{"dtype":"U8","shape":[-0],"data_offsets":[8,8]}',
        '"u":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}',
        '"u":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}',
        '"u":{"dtype":"U8","shape":[1],"data_offsets":[9,10]}',
        '"u":{"dtype":"F32","shape":[9223372036854775808,4,0],"data_offsets":[8,8]}',
    ],
    "metadata": [*VALUES, '{"format":1}', '{"format":null}', '{"format":["pt"]}', '{"format":NaN}', r'{"format":"\ud800"}'],
    "tail": [" ", "\n", "\0", "}", ",", "{}", "//", "x", "\ufeff", "\x0b"],
    "encoding": ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1"],
    "data": [b"", bytes(7), bytes(9), bytes(16)],
}


def build(**changes: Any) -> bytes:
    """The bytes of a file: GOOD with some of its holes filled otherwise."""
    filled = {**GOOD, **changes}
    entry = filled["entry"].format(**filled) if "{{" in filled["entry"] else filled["entry"]
    text = f'{{{filled["name"]}:{entry},{filled["second"]},"__metadata__":{filled["metadata"]}}}{filled["tail"]}'
    body = filled["bom"] + text.encode(filled["encoding"], "surrogatepass" if filled["encoding"].startswith("utf") else "replace")
    return len(body).to_bytes(8, "little") + body + filled["data"]


def test_the_file_with_holes_is_sound_before_it_is_spoiled(path: Path) -> None:
    assert we_read(path, build()) == library_reads(build()) == {"w": ("F32", (2, 1), bytes(8)), "u": ("U8", (0,), b"")}


@pytest.mark.parametrize("hole", sorted(BAD))
def test_one_bad_value_is_not_accepted_where_the_library_refuses_it(path: Path, hole: str) -> None:
    laxer = []
    for value in BAD[hole]:
        data = build(**{hole: value})
        if we_read(path, data) not in (None, library_reads(data)):
            laxer.append(value if len(value) < 60 else value[:20])
    assert laxer == []


@MANY
@given(st.fixed_dictionaries({}, optional={hole: st.sampled_from(values) for hole, values in BAD.items()}))
def test_several_bad_values_are_not_accepted_where_the_library_refuses_them(path: Path, changes: dict[str, Any]) -> None:
    assert_no_laxer(path, build(**changes))


@MANY
@given(
    tensors,
    metadata,
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(-3, 3),
)
def test_changed_bytes_are_not_accepted_where_the_library_refuses_them(
    path: Path, layout: Tensors, notes: dict[str, str], changes: list[tuple[float, int]], growth: int
) -> None:
    data = bytearray(dump_header(layout, notes) + noise(size_of(layout)))
    for place, value in changes:
        data[int(place * len(data))] = value
    spoiled = bytes(data[:growth] if growth < 0 else data + bytes(growth))
    assert_no_laxer(path, spoiled)


@MANY
@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda body: len(body).to_bytes(8, "little") + body))
@example(b"")
@example(bytes(8))
@example(b"\xff" * 8)
@example((2).to_bytes(8, "little") + b"{}")
def test_any_bytes_give_a_header_or_a_file_format_error(path: Path, data: bytes) -> None:
    assert_no_laxer(path, data)


@SEVERAL
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "w"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_json_gives_a_header_or_a_file_format_error(path: Path, document: object) -> None:
    body = json.dumps(document).encode()
    assert_no_laxer(path, len(body).to_bytes(8, "little") + body)


class Counted:
    """An open file that counts what is read from it."""

    def __init__(self, file: BinaryIO, counts: list[int]) -> None:
        self.file, self.counts = file, counts

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.counts.append(len(data))
        return data


def read_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Header | None, int]:
    counts: list[int] = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: Counted(original(self, *args, **kwargs), counts))
    try:
        return read_header(path), sum(counts)
    except FileFormatError:
        return None, sum(counts)


def test_only_the_header_of_a_large_file_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = dump_header({"w": ("float32", (1 << 20, 1 << 12))}, {})
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + (1 << 34))  # sparse: it takes no space
    header, count = read_counted(path, monkeypatch)
    path.unlink()
    assert header is not None
    assert header.tensors["w"].end == len(raw) + (1 << 34)
    assert count == len(raw)


@pytest.mark.parametrize("length", [MAX_HEADER + 1, (1 << 63) + 1, (1 << 64) - 1, 1 << 30])
def test_a_header_of_absurd_length_is_refused_from_its_first_eight_bytes(path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(MAX_HEADER + 64)
    header, count = read_counted(path, monkeypatch)
    path.unlink()
    assert header is None
    assert count == 8


def test_missing_file_and_directory_are_file_format_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileFormatError, match="cannot be read"):
            read_header(path)
