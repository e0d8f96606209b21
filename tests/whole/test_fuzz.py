"""Spoiled files: every operation either succeeds or raises a TorchgraftError, and writes nothing but its own output.

Each property runs on a few cases in the quick tests and on thousands in the slow one.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import signal
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file

import torchgraft as tg
from torchgraft import dtypes
from torchgraft.checkpoint.header import dump_header, read_header
from torchgraft.checkpoint.reading import INDEX, open_checkpoint
from torchgraft.errors import FileFormatError
from torchgraft.layers.of_checkpoint import layers_of_checkpoint
from torchgraft.on_files.check import check
from torchgraft_cli.main import main

SECONDS = 20
"""For one operation, which takes milliseconds: more is a hang, also on a busy machine."""
MEMORY = 1 << 20, 120
"""Bytes that reading a header may take: so many, and so many times the size of the file."""

PREFIX = "base_model.model."
Q, FC1 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.fc1"
SHARDS = {
    "model-1.safetensors": {"model.embed_tokens.weight": (6, 4), f"{Q}.weight": (4, 4), f"{Q}.bias": (4,)},
    "model-2.safetensors": {f"{FC1}.weight": (6, 4), "model.norm.weight": (4,), "lm_head.weight": (6, 4)},
}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "hidden_size": 4}
PEFT = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": ["q_proj"],
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}


@dataclass(frozen=True)
class Sandbox:
    """A base in two shards, two adapters, one of them merged, and beside them what nobody may touch."""

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def listing(self) -> dict[str, str]:
        """Every path and what is there."""
        return {path.relative_to(self.root).as_posix(): _content(path) for path in sorted(self.root.rglob("*"))}

    @contextmanager
    def with_file(self, name: str, content: bytes) -> Iterator[None]:
        """`content` in place of the file `name`, for a while."""
        path = self.root / name
        before = path.read_bytes() if path.is_file() else None
        path.write_bytes(content)
        try:
            yield
        finally:
            path.unlink() if before is None else path.write_bytes(before)


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


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


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"it takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fails(call: Callable[[], object]) -> str:
    """The message of a TorchgraftError, or nothing. Any other exception goes on and is a failure."""
    with time_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore", tg.TorchgraftWarning)
        try:
            call()
        except tg.TorchgraftError as error:
            return str(error) or "(an error that says nothing)"
    return ""


def run_cli(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with time_limit(), warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
        warnings.simplefilter("default", tg.TorchgraftWarning)
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def assert_plain(*command: object) -> int:
    """One line of error at most, and no bug."""
    code, out, err = run_cli(*command)
    assert code in (0, 2), err or out
    assert "Traceback" not in out + err
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) <= 1, err
    if errors:
        assert code == 2
        assert errors[0].startswith("error: ")
    assert "\x1b" not in out + err
    return code


Operation = Callable[[Sandbox], object]


def look(sandbox: Sandbox) -> object:
    return layers_of_checkpoint(open_checkpoint(sandbox / "base"))


def check_with(adapter: str) -> Operation:
    return lambda sandbox: check(sandbox / "base", sandbox / adapter)


def merge_with(adapter: str, base: str = "base") -> Operation:
    return lambda sandbox: tg.merge_checkpoint(sandbox / base, sandbox / adapter, sandbox / "out")


def unmerge(sandbox: Sandbox) -> object:
    return tg.unmerge_checkpoint(sandbox / "merged", sandbox / "out")


COMMANDS = {
    "inspect": ("inspect", "base"),
    "select": ("inspect", "base", "--target", "@linear", "--json"),
    "check peft": ("check", "base", "peft"),
    "check native": ("check", "base", "native", "--json"),
    "merge peft": ("merge", "base", "peft", "-o", "out"),
    "merge native": ("merge", "base", "native", "-o", "out", "--json"),
    "merge again": ("merge", "merged", "native", "-o", "out"),
    "unmerge": ("unmerge", "merged", "-o", "out"),
}
OPERATIONS: dict[str, Operation] = {
    "inspect": look,
    "select": lambda sandbox: tg.plan(sandbox / "base", "@linear"),
    "check peft": check_with("peft"),
    "check native": check_with("native"),
    "merge peft": merge_with("peft"),
    "merge native": merge_with("native"),
    "merge again": merge_with("native", "merged"),
    "unmerge": unmerge,
}


def assert_harmless(sandbox: Sandbox, names: list[str], by_command: bool) -> None:
    """Each operation, or its command, ends well or with a message, and leaves no more than its output."""
    folders = {"base", "peft", "native", "merged", "out"}
    before = sandbox.listing()
    for name in names:
        if by_command:
            words = [sandbox / word if word in folders else word for word in COMMANDS[name]]
            failed = assert_plain(*words) != 0
        else:
            failed = bool(fails(partial(OPERATIONS[name], sandbox)))
        after = sandbox.listing()
        if not failed:
            after = {path: content for path, content in after.items() if path.split("/")[0] != "out"}
            shutil.rmtree(sandbox / "out", ignore_errors=True)
        assert after == before, name


# What files are spoiled with.

NAMES = [
    "",
    ".",
    "..",
    "../outside/model-2.safetensors",
    "/etc/passwd",
    "a\\b",
    "C:x",
    "\0",
    "model-2.safetensors",
    "x" * 300,
    "re:(",
    "q_proj",
]
NAMES += [
    "model-1.safetensors/",
    "./model-1.safetensors",
    "loop",
    "folder",
    "link",
    "*",
    "{",
    "@all",
    "Linear",
    "float32",
    "lora",
    "9" * 5000,
]
NAMES += ["\x1b[2J", "a\nb", f"{Q}\x1b[2J", r"(a|a)*\Z"]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**70),
    st.sampled_from([-1, 0, 1, 2, 1 << 31, 1 << 63, 1 << 64, 10**400, 1e308, -0.0, float("nan"), float("inf")]),
    st.sampled_from(NAMES),
    st.text(max_size=6),
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
nested = st.sampled_from([100, 2000, 100_000]).map(lambda depth: b"[" * depth + b"]" * depth)
places = st.floats(0, 1, exclude_max=True)
changes = st.lists(st.tuples(places, st.sampled_from(["set", "delete", "add"]), junk), min_size=1, max_size=3)
raw = st.one_of(
    st.binary(max_size=40), nested, st.sampled_from([b"", b"{", b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b'{"a":1,"a":2}', b"NaN"])
)
cases = st.one_of(changes, changes, changes, raw)


def _paths(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from _paths(item, (*path, key))


def spoiled(content: bytes, case: list[tuple[float, str, object]] | bytes) -> bytes:
    """The JSON in `content` with values replaced, removed or added somewhere in it; or other bytes altogether."""
    if isinstance(case, bytes):
        return case
    document = json.loads(content)
    for place, action, value in case:
        paths = list(_paths(document))
        if not paths:
            break
        path = paths[int(place * len(paths))]
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        if action == "delete":
            del holder[path[-1]]
        elif action == "add" and isinstance(holder, dict):
            holder[str(value)[:20]] = copy.deepcopy(value)
        else:
            holder[path[-1]] = copy.deepcopy(value)
    return json.dumps(document).encode()


# Headers.

layouts = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(dtypes.SIZES)), st.lists(st.integers(0, 5), max_size=4).map(tuple)),
    min_size=1,
    max_size=4,
)
lengths = st.sampled_from([0, 1, 7, 100_000_000, 100_000_001, 1 << 31, 1 << 62, (1 << 63) + 5, (1 << 64) - 1])
edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), places, st.integers(0, 7)),
        st.tuples(st.just("set"), places, st.sampled_from(list(b'"{}[]:,-0129.eE\\ \n\0tfn\xff\xc3'))),
        st.tuples(
            st.just("insert"), places, st.sampled_from([b"0", b"-", b'"', b",", b"{", b"}", b"[", b"]", b"e5", b".0", b"\\u0041", b" "])
        ),
        st.tuples(st.just("cut"), places, st.just(0)),
        st.tuples(st.just("append"), places, st.integers(1, 9)),
        st.tuples(st.just("length"), places, lengths),
        st.tuples(st.just("twice"), places, st.integers(1, 60)),
    ),
    min_size=1,
    max_size=3,
)


def edited(data: bytes, steps: list[tuple[str, float, Any]]) -> bytes:
    for action, place, value in steps:
        at = int(place * len(data))
        if action == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << value]) + data[at + 1 :]
        elif action == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif action == "insert":  # the length is put right, so that the JSON is what is wrong
            length = int.from_bytes(data[:8], "little") + len(value)
            at = max(at, 8)
            data = (length % (1 << 64)).to_bytes(8, "little") + data[8:at] + value + data[at:]
        elif action == "cut":
            data = data[:at]
        elif action == "append":
            data += bytes(value)
        elif action == "length":
            data = value.to_bytes(8, "little") + data[8:]
        elif action == "twice":
            length = int.from_bytes(data[:8], "little") + value
            data = (length % (1 << 64)).to_bytes(8, "little") + data[8 : at + value] + data[at:]
    return data


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
