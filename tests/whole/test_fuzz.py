"""Spoiled files: every operation either succeeds or raises a TorchgraftError, and writes nothing but its own output.

Each property runs on a few cases in the quick tests and on thousands in the slow one.
"""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file

import torchgraft as tg
from sandbox import CONFIG, MEMORY, PEFT, SHARDS, Sandbox, assert_harmless, assert_plain, fails, run_cli
from spoiled_files import NAMES, PREFIX, Q, cases, edited, edits, junk, layouts, scalars, spoiled
from torchgraft import dtypes
from torchgraft.checkpoint.header import dump_header, read_header
from torchgraft.checkpoint.reading import INDEX, open_checkpoint
from torchgraft.errors import FileFormatError
from torchgraft.layers.of_checkpoint import layers_of_checkpoint
from torchgraft.on_files.check import check


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("base", "peft", "outside"):
        (root / name).mkdir()
    generator = torch.Generator().manual_seed(0)
    for shard, shapes in SHARDS.items():
        save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, root / "base" / shard)
    shutil.copy(root / "base" / "model-2.safetensors", root / "outside" / "model-2.safetensors")
    weight_map = {name: shard for shard, shapes in SHARDS.items() for name in shapes}
    factors = {"lora_A": torch.randn(2, 4, generator=generator), "lora_B": torch.randn(4, 2, generator=generator)}
    save_file({f"{PREFIX}{Q}.{key}.weight": tensor for key, tensor in factors.items()}, root / "peft" / "adapter_model.safetensors")
    for name, document in {
        f"base/{INDEX}": {"metadata": {"total_size": 0}, "weight_map": weight_map},
        "base/config.json": CONFIG,
        "base/generation_config.json": {"eos_token_id": 2},
        "peft/adapter_config.json": PEFT,
    }.items():
        (root / name).write_text(json.dumps(document))
    selection = ["--plugin", "lora", "--target", "q_proj", "--target", "fc1", "--also-train", "norm", "-r", "2"]
    done = run_cli("apply", root / "base", *selection, "-o", root / "native")
    assert done[0] == 0, done
    tg.merge_checkpoint(root / "base", root / "peft", root / "merged")
    return Sandbox(root)


# What is run on spoiled files.


# Headers.


STRICTER = ("which torchgraft does not know", "a name occurs twice", "which is all that the format allows")
"""What we refuse and the library reads: dtypes that our torch may not have, a name for two things, and keys without a meaning."""


def library_reads(data: bytes) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    try:
        return {name: (info["dtype"], tuple(info["shape"])) for name, info in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        return None


def assert_read_as_the_library_does(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    found: dict[str, tuple[str, tuple[int, ...]]] | None = None

    def read() -> None:
        nonlocal found
        header = read_header(path)
        found = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}

    tracemalloc.start()
    try:
        refusal = fails(read)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY[0] + MEMORY[1] * len(data)
    assert len(refusal) < 2000
    if refusal and any(reason in refusal for reason in STRICTER):
        return
    expected = library_reads(data)
    assert found == (expected and {name: (dtypes.NAMES[code], shape) for name, (code, shape) in expected.items()}), refusal


def changed_header(sandbox: Sandbox, case: tuple[Any, Any]) -> None:
    layout, steps = case
    size = sum(torch.Size(shape).numel() * dtypes.SIZES[dtype] for dtype, shape in layout.values())
    assert_read_as_the_library_does(sandbox / "x.safetensors", edited(dump_header(layout, {"format": "pt"}) + bytes(size), steps))


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*dtypes.NAMES, "F4", "F6_E2M3", "F8_E4M3FNUZ", "f32", "F32\0"]) | junk,
        "shape": st.lists(st.integers(0, 3) | scalars, max_size=4) | st.integers(1, 40).map(lambda rank: [1 << 63] * rank) | junk,
        "data_offsets": st.lists(st.integers(0, 64) | scalars, min_size=2, max_size=2) | st.just([0, 0]) | junk,
        "extra": junk,
    },
)
documents = st.one_of(
    junk,
    st.dictionaries(st.sampled_from([*NAMES, "__metadata__", "é\U0001f600", "a.b"]), entries | junk, max_size=4),
    st.lists(entries, max_size=2),
)


def any_header(sandbox: Sandbox, document: object) -> None:
    body = json.dumps(document).encode()
    for size in (0, 4, 16):
        assert_read_as_the_library_does(sandbox / "x.safetensors", len(body).to_bytes(8, "little") + body + bytes(size))


def changed_shard(sandbox: Sandbox, case: tuple[list[tuple[str, float, Any]], str, bool]) -> None:
    steps, name, by_command = case
    with sandbox.with_file(name, edited((sandbox / name).read_bytes(), steps)):
        operations = {"base": ["inspect", "select", "merge peft"], "peft": ["check peft", "merge peft"], "native": ["check native"]}
        assert_harmless(sandbox, operations.get(name.split("/")[0], ["merge again", "unmerge"]), by_command)


deep_names = st.sampled_from(
    ["a." * 5000, "9" * 5000 + ".weight", "." * 64, ".a", "a..b", "a.", "\x1b[2J.weight", "x" * 50_000, "h.٣.weight", "h.²"]
)
odd_layouts = st.lists(deep_names | st.text(max_size=8).filter(lambda name: name.isprintable()), min_size=1, max_size=4, unique=True)


def odd_names(sandbox: Sandbox, names: list[str]) -> None:
    layout = {name: ("float32", (2, 2)) for name in names if name != "__metadata__"}
    path = sandbox / "odd.safetensors"
    path.write_bytes(dump_header(layout, {}) + bytes(16 * len(layout)))
    fails(lambda: layers_of_checkpoint(open_checkpoint(path)))
    fails(lambda: tg.plan(path, "@all", also_train="a", allow_unmatched=True))
    for options in ([], ["--json"], ["--target", "@all", "--layers", "0", "--allow-unmatched"]):
        assert_plain("inspect", path, *options)


# JSON files.


def index_of(sandbox: Sandbox, case: tuple[Any, bool]) -> None:
    change, by_command = case
    extras = {"loop": "loop", "link": "../outside/model-2.safetensors"}
    (sandbox / "base/folder").mkdir()
    for name, target in extras.items():
        (sandbox / f"base/{name}").symlink_to(target)
    try:
        content = spoiled((sandbox / f"base/{INDEX}").read_bytes(), change)
        with sandbox.with_file(f"base/{INDEX}", content):
            assert_harmless(sandbox, ["inspect", "select"], by_command)
    finally:
        (sandbox / "base/folder").rmdir()
        for name in extras:
            (sandbox / f"base/{name}").unlink()


shard_maps = st.dictionaries(
    st.sampled_from([name for shapes in SHARDS.values() for name in shapes] + ["x"]), st.sampled_from([*SHARDS, *NAMES]) | junk, max_size=7
)
indexes = st.one_of(cases, shard_maps.map(lambda found: json.dumps({"weight_map": found}).encode()))

JSON_FILES = {
    "base/config.json": ["inspect", "select", "check peft", "merge peft"],
    "base/generation_config.json": ["inspect", "merge peft"],
    "peft/adapter_config.json": ["check peft", "merge peft"],
    "native/adapter_config.json": ["check native", "merge native"],
    "native/torchgraft.json": ["check native", "merge native"],
    "merged/torchgraft_merge.json": ["unmerge", "merge again"],
    "merged/config.json": ["unmerge"],
    "merged/torchgraft_undo/adapters/0/adapter_config.json": ["unmerge"],
}


def json_file(name: str) -> Callable[[Sandbox, tuple[Any, bool]], None]:
    def of_one_file(sandbox: Sandbox, case: tuple[Any, bool]) -> None:
        change, by_command = case
        with sandbox.with_file(name, spoiled((sandbox / name).read_bytes(), change)):
            assert_harmless(sandbox, JSON_FILES[name], by_command)

    return of_one_file


sometimes = st.sampled_from([False, False, False, True])
shards = st.sampled_from(
    [
        "base/model-1.safetensors",
        "base/model-2.safetensors",
        "peft/adapter_model.safetensors",
        "native/adapter_model.safetensors",
        "merged/model-1.safetensors",
        "merged/torchgraft_undo/corrections.safetensors",
    ]
)
PROPERTIES: dict[str, tuple[Callable[[Sandbox, Any], None], st.SearchStrategy[Any], int, int]] = {
    "changed header": (changed_header, st.tuples(layouts, edits), 100, 2000),
    "any header": (any_header, documents, 50, 800),
    "changed shard": (changed_shard, st.tuples(edits, shards, sometimes), 30, 500),
    "odd names": (odd_names, odd_layouts, 15, 150),
    "index": (index_of, st.tuples(indexes, sometimes), 40, 800),
    **{name: (json_file(name), st.tuples(cases, sometimes), 15, 600) for name in JSON_FILES},
}
"""Name → property, what it is given, how many cases in the quick run and in the slow one."""


def run_property(sandbox: Sandbox, name: str, count: int) -> None:
    prove, strategy, _, _ = PROPERTIES[name]

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(case: Any) -> None:
        prove(sandbox, case)

    run()


@pytest.mark.parametrize("name", PROPERTIES)
def test_spoiled_files_do_no_harm(sandbox: Sandbox, name: str) -> None:
    run_property(sandbox, name, PROPERTIES[name][2])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_thousands_of_spoiled_files_do_no_harm(sandbox: Sandbox, name: str) -> None:
    assert sum(slow for *_, slow in PROPERTIES.values()) >= 5000
    run_property(sandbox, name, PROPERTIES[name][3])


def test_a_shape_of_many_large_numbers_is_refused_at_once(sandbox: Sandbox) -> None:
    shape = [1 << 63] * 200_000  # their product would have four million digits
    body = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    assert_read_as_the_library_does(sandbox / "x.safetensors", len(body).to_bytes(8, "little") + body)


def test_names_that_are_too_deep_for_a_model_are_refused(sandbox: Sandbox) -> None:
    path = sandbox / "deep.safetensors"
    path.write_bytes(dump_header({"a." * 100_000 + "weight": ("float32", ())}, {}) + bytes(4))
    with pytest.raises(FileFormatError, match="dots"):
        layers_of_checkpoint(open_checkpoint(path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX, "model-1.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(sandbox: Sandbox, tmp_path: Path, name: str) -> None:
    base = shutil.copytree(sandbox / "base", tmp_path / "base")
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    assert fails(lambda: open_checkpoint(base))


def test_a_name_that_only_an_escape_spells_twice_is_refused(sandbox: Sandbox) -> None:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    for second in ("a:b", r"a\u003ab", r"\u0061:b"):  # the colon's escape makes up for the second colon, were only colons counted
        body = f'{{"a:b":{entry},"{second}":{entry}}}'.encode()
        path = sandbox / "x.safetensors"
        path.write_bytes(len(body).to_bytes(8, "little") + body)
        assert "occurs twice" in fails(lambda path=path: read_header(path))


# Records whose values have other types.


def _native(sandbox: Sandbox, change: Callable[[dict[str, Any]], object]) -> bytes:
    record = json.loads((sandbox / "native/torchgraft.json").read_bytes())
    change(record)
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(also_saved=None),
        lambda record: record.update(quantized={"fc1": 3}),
        lambda record: record.update(state={"values": {}}),
        lambda record: record["sites"][0].update(groups=None),
        lambda record: record["sites"][0].update(groups=0),
        lambda record: record["sites"][0].update(beneath=[3]),
    ],
)
def test_a_record_whose_options_have_other_types_is_refused(sandbox: Sandbox, change: Callable[[dict[str, Any]], None]) -> None:
    with sandbox.with_file("native/torchgraft.json", _native(sandbox, change)):
        (problem,) = check(sandbox / "base", sandbox / "native").problems
        assert "torchgraft.json: invalid record: " in problem


def test_a_block_of_thousands_of_digits_is_no_bug(sandbox: Sandbox) -> None:
    path = sandbox / "digits.safetensors"
    path.write_bytes(dump_header({"9" * 5000 + ".q_proj.weight": ("float32", (1, 1))}, {}) + bytes(4))
    tg.plan(path, "@all", "0", allow_unmatched=True)
