"""What users get wrong: exit code 2, one line that says where and what, nothing on stdout, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from command import Result
from references import tree

Adapt = Callable[..., Result]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SHAPES = {f"model.layers.{i}.self_attn.{name}.weight": (rows, 6) for i in (0, 1) for name, rows in (("q_proj", 6), ("v_proj", 3))}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a sound `model` and an `adapter` for it."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")
    make_adapter(tmp_path / "adapter")
    return tmp_path


def make_model(folder: Path, *, value: float = 1.0) -> None:
    folder.mkdir()
    save_file({name: torch.full(shape, value) for name, shape in SHAPES.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')


def make_adapter(folder: Path, module: str = Q, shapes: tuple[tuple[int, int], ...] = ((2, 6), (6, 2))) -> None:
    """A PEFT adapter for one layer."""
    folder.mkdir()
    letters = ("embedding_A", "embedding_B") if "embed" in module else ("A.weight", "B.weight")
    tensors = {f"base_model.model.{module}.lora_{x}": torch.full(shape, 0.5) for x, shape in zip(letters, shapes, strict=True)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def refused(adapt: Adapt, place: Path) -> Callable[..., None]:
    """Run a command that must be refused, with and without --json."""

    def run(*arguments: object, says: tuple[str, ...] = ()) -> None:
        before = tree(place)
        for more in ([], ["--json"]):
            result = adapt(*arguments, *more)
            assert (result.code, result.out) == (2, ""), result.err
            assert re.fullmatch(r"error: .+\n", result.err), result.err
            assert [word for word in says if word not in result.err] == [], result.err
            assert tree(place) == before

    return run


def every_command(source: object) -> list[list[object]]:
    """Each command that reads a model, on `source`."""
    return [
        ["inspect", source],
        ["inspect", source, "--target", "q_proj"],
        ["apply", source, "--plugin", "lora", "-o", "out"],
        ["check", source, "adapter"],
        ["merge", source, "adapter", "-o", "out"],
        ["merge", source, "adapter", "-o", "out", "--dry-run"],
        ["unmerge", source, "-o", "out"],
    ]


def raw(header: object, data: bytes = bytes(8), *, length: int | None = None) -> bytes:
    """A safetensors file with that header: text, or what becomes JSON."""
    body = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return (len(body) if length is None else length).to_bytes(8, "little") + body + data


def one(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict[str, object]:
    return {"w.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}


TWIN = '"w.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "random bytes": (random.Random(0).randbytes(999), ("header claims",)),
    "text": (b"this is the README of a model\n" * 9, ("header claims",)),
    "empty file": (b"", ("0 bytes",)),
    "five bytes": (b"\2\0\0\0\0", ("5 bytes",)),
    "truncated data": (raw(one())[:-3], ("truncated",)),
    "truncated header": (raw(one(), b"")[:-9], ("truncated",)),
    "appended": (raw(one()) + b"more", ("appended",)),
    "huge length": (raw(one(), length=(1 << 64) - 1), ("header claims", "18,446,744,073,709,551,615")),
    "not JSON": (raw("{'w': 1}"), ("JSON",)),
    "not UTF-8": (b"\4\0\0\0\0\0\0\0{\xff\xfe}", ("JSON",)),
    "zeros": (bytes(64), ("JSON",)),
    "not an object": (raw([1, 2]), ("JSON object",)),
    "nested garbage": (raw({"w.weight": [{"dtype": [[{}]]}]}), ("'w.weight'",)),
    "very deep": (raw("[" * 100_000), ("JSON",)),
    "entry is null": (raw({"w.weight": None}), ("'w.weight'", "lacks")),
    "no offsets": (raw({"w.weight": {"dtype": "F32", "shape": [2]}}), ("'w.weight'", "data_offsets")),
    "three offsets": (raw(one(offsets=[0, 4, 8])), ("'w.weight'", "data_offsets")),
    "duplicate names": (raw(f"{{{TWIN},{TWIN}}}"), ("twice",)),
    "negative offsets": (raw(one(offsets=[-8, 0])), ("'w.weight'", "-8")),
    "reversed offsets": (raw(one(offsets=[8, 0])), ("'w.weight'", "-8")),
    "overlapping offsets": (raw(one(u=one("F32", [1], [4, 8])["w.weight"])), ("'u'", "overlaps")),
    "gap": (raw(one(u=one("F32", [1], [12, 16])["w.weight"]), bytes(16)), ("'u'", "gap")),
    "gap at the start": (raw(one(offsets=[8, 16]), bytes(16)), ("'w.weight'", "gap")),
    "offsets beyond the file": (raw(one(shape=[1 << 40], offsets=[0, 1 << 42])), ("truncated", f"{1 << 42:,}"[:5])),
    "unknown dtype": (raw(one("F31")), ("'w.weight'", "'F31'")),
    "size is not shape × dtype": (raw(one(shape=[3])), ("'w.weight'", "12", "8")),
    "fraction in the shape": (raw(one(shape=[2.0])), ("'w.weight'", "2.0")),
    "bool in the shape": (raw(one(shape=[2, True])), ("'w.weight'", "True")),
    "negative shape": (raw(one(shape=[-2])), ("'w.weight'", "-2")),
    "metadata is a list": (raw(one(__metadata__=["pt"])), ("__metadata__",)),
    "metadata of numbers": (raw(one(__metadata__={"format": 1})), ("__metadata__",)),
}


@pytest.mark.parametrize("what", sorted(FILES))
def test_broken_file(place: Path, refused: Callable[..., None], what: str) -> None:
    content, says = FILES[what]
    (place / "bad.safetensors").write_bytes(content)
    (place / "bad").mkdir()
    shutil.copy("bad.safetensors", "bad/model.safetensors")
    for command in [*every_command("bad.safetensors"), ["inspect", "bad"]]:
        refused(*command, says=("bad", ".safetensors", *says))


def holding(**files: object) -> Callable[[Path], None]:
    """Writes a directory of files, a_txt=… to a.txt: tensors for a list of their names, else text or JSON."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for key, content in files.items():
            path = folder / key.replace("_", ".")
            if path.suffix in (".safetensors", ".bin") and isinstance(content, list):
                save_file({name: torch.ones(2) for name in content}, path)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))

    return make


def shard(name: object) -> Callable[[Path], None]:
    return holding(**{INDEX: {"weight_map": {"w": name}}})


INDEX = "model.safetensors.index.json"
DIRECTORIES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no such directory": (lambda _: None, ("no such file or directory",)),
    "empty directory": (holding(), ("no .safetensors file",)),
    "pickles only": (holding(pytorch_bin=["w"]), (".bin", "save_pretrained")),
    "adapter as model": (make_adapter, ("adapter directory", "base model")),
    "two files and no index": (holding(a_safetensors=["w"], b_safetensors=["u"]), ("a.safetensors, b.safetensors", INDEX)),
    "shard is missing": (shard("a.safetensors"), (INDEX, "'a.safetensors'", "missing")),
    "shard above": (shard("../model/model.safetensors"), (INDEX, "outside")),
    "shard hidden above": (shard("a/../../model/model.safetensors"), (INDEX, "outside")),
    "absolute shard": (shard("/etc/passwd"), (INDEX, "outside", "/etc/passwd")),
    "shard with backslashes": (shard("..\\model\\model.safetensors"), (INDEX, "outside")),
    "shard on a drive": (shard("C:\\model.safetensors"), (INDEX, "outside")),
    "shard with a zero byte": (shard("a\0.safetensors"), (INDEX,)),
    "shard with an endless name": (shard("a" * 5000), ("a" * 50,)),
    "shard is a number": (shard(1), (INDEX, "weight_map")),
    "index is no JSON": (holding(**{INDEX: "{'weight_map': {}}"}), (INDEX, "JSON")),
    "index is a list": (holding(**{INDEX: []}), (INDEX, "list")),
    "index without weight_map": (holding(**{INDEX: {"metadata": {}}}), (INDEX, "weight_map")),
    "weight_map is a list": (holding(**{INDEX: {"weight_map": ["w"]}}), (INDEX, "weight_map")),
    "tensor in two shards": (
        holding(
            **{INDEX: {"weight_map": {"v": "a.safetensors", "u": "b.safetensors"}}}, a_safetensors=["v", "w"], b_safetensors=["w", "u"]
        ),
        (INDEX, "'w'", "two shards", "a.safetensors", "b.safetensors", "lists neither"),
    ),
    "tensor not in its shard": (holding(**{INDEX: {"weight_map": {"w": "a.safetensors"}}}, a_safetensors=[]), (INDEX, "'w'")),
    "config.json is no JSON": (holding(model_safetensors=["w"], config_json="{"), ("config.json", "JSON")),
    "config.json is a list": (holding(model_safetensors=["w"], config_json=[]), ("config.json", "list")),
}


@pytest.mark.parametrize("what", sorted(DIRECTORIES))
def test_broken_directory(place: Path, refused: Callable[..., None], what: str) -> None:
    make, says = DIRECTORIES[what]
    make(place / "bad")
    for command in every_command("bad"):
        refused(*command, says=("bad", *says))


@pytest.mark.parametrize("name", ["model.bin", "model.gguf", "model"])
def test_file_with_another_suffix(place: Path, refused: Callable[..., None], name: str) -> None:
    (place / "files").mkdir()
    (place / "files" / name).write_bytes((place / "model" / "model.safetensors").read_bytes())
    for command in every_command(f"files/{name}"):
        refused(*command, says=(name, ".safetensors"))


@pytest.mark.parametrize("name", ["nobody/nothing", "my--models/run", "a/b/c", "x" * 300, "two\nlines", "."])
def test_source_that_is_nothing(refused: Callable[..., None], name: str) -> None:
    refused("inspect", name)


SELECTIONS: dict[str, tuple[list[object], tuple[str, ...]]] = {
    "pattern without a match": (["--target", "q_prj"], ("'q_prj'", "near names: q_proj")),
    "one pattern of two": (["--target", "v_proj", "--target", "*.k_proj"], ("'*.k_proj'", "v_proj")),
    "exclude without a match": (["--target", "q_proj", "--target", "!k_proj"], ("'!k_proj'",)),
    "container": (["--target", "self_attn"], ("'self_attn'", "self_attn.*")),
    "role without a match": (["--target", "@mlp"], ("'@mlp'", "@attention")),
    "unknown role": (["--target", "@attn"], ("'@attn'", "@attention")),
    "empty pattern": (["--target", ""], ("empty",)),
    "only excludes": (["--target", "!q_proj"], ("only excludes", "@linear")),
    "all excluded": (["--target", "q_proj", "--target", "!@all"], ("!@all",)),
    "broken regex": (["--target", "re:("], ("'re:('", "regular expression")),
    "broken braces": (["--target", "*.{q,v"], ("'*.{q,v'", "braces")),
    "block that is not there": (["--layers", "0-3"], ("block 2", "0 to 1")),
    "layers that are no numbers": (["--layers", "first"], ("'first'", "0-15,20")),
    "layers the wrong way round": (["--layers", "1-0"], ("'1-0'", "0-15,20")),
    "module to train that is not there": (["--also-train", "clasifier"], ("'clasifier'",)),
    "override without a match": (["--override", "k_proj", "rank=2"], ("'k_proj'",)),
    "override of no option": (["--override", "q_proj", "rnk=2"], ("'rnk'", "near names: rank")),
    "override without =": (["--override", "q_proj", "rank"], ("'rank'", "rank=16")),
    "kind that does not exist": (["--kind", "q_proj=Liner"], ("'Liner'",)),
    "kind without =": (["--kind", "q_proj"], ("'q_proj'", "=Linear")),
    "unknown option": (["--set", "rnk=4"], ("lora", "'rnk'", "near names: rank")),
    "option without =": (["--set", "rank"], ("'rank'", "rank=16")),
    "option without a name": (["--set", "=4"], ("'=4'", "rank=16")),
    "rank 0": (["--rank", 0], ("rank = 0", "greater than or equal to 1")),
    "rank -1": (["-r", -1], ("rank = -1",)),
    "rank abc": (["-r", "abc"], ("rank = 'abc'", "integer")),
    "rank 2.5": (["-r", "2.5"], ("rank = 2.5", "integer")),
    "rank true": (["--set", "rank=true"], ("rank = True", "integer")),
    "rank of many digits": (["-r", "9" * 5000], ("rank", "integer")),
    "alpha 0": (["--alpha", 0], ("alpha = 0", "greater than 0")),
    "alpha nan": (["--set", "alpha=NaN"], ("alpha = nan", "finite")),
    "alpha infinite": (["--set", "alpha=Infinity"], ("alpha = inf", "finite")),
    "dropout 2": (["--set", "dropout=2"], ("dropout = 2", "less than 1")),
    "dtype int8": (["--set", "dtype=int8"], ("dtype = 'int8'", "'bfloat16'")),
    "init zero": (["--set", "init=zero"], ("init = 'zero'", "gradients")),
    "two ranks": (["-r", 4, "--set", "rank=8"], ("rank is given twice", "4", "8")),
    "two mistakes": (["-r", 0, "--set", "drop=1"], ("rank = 0", "'drop'", "dropout")),
}


@pytest.mark.parametrize("what", sorted(SELECTIONS))
def test_selection_or_setting_that_cannot_be(refused: Callable[..., None], what: str) -> None:
    arguments, says = SELECTIONS[what]
    refused("inspect", "model", *arguments, says=says)
    refused("apply", "model", "--plugin", "lora", "-o", "out", *arguments, says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspekt", "model"], ("'inspekt'", "adapt --help")),
        (["inspect", "model", "--plugin", "lorra"], ("'lorra'", "near names: lora", "adapt plugins list")),
        (["apply", "model", "--plugin", "lorra", "-o", "out"], ("'lorra'", "near names: lora", "adapt plugins list")),
        (["plugins", "show", "lorra"], ("'lorra'", "near names: lora", "adapt plugins list")),
        (["plugins", "lst"], ("'lst'", "adapt plugins --help")),
        (["inspect", "model", "--targets", "q_proj"], ("--targets", "--target", "adapt inspect --help")),
        (["inspect", "model", "--depth", "0"], ("--depth", "0")),
        (["inspect", "model", "--depth", "all"], ("--depth", "all")),
        (["inspect"], ("SOURCE", "adapt inspect --help")),
        (["inspect", "model", "adapter"], ("adapter", "adapt inspect --help")),
        (["apply", "model", "-o", "out"], ("--plugin", "adapt apply --help")),
        (["apply", "model", "--plugin", "lora"], ("--output", "adapt apply --help")),
        (["apply", "model", "--plugin", "lora", "-o", "out", "--seed", "x"], ("--seed", "'x'")),
        (["merge", "model", "-o", "out"], ("ADAPTER", "adapt merge --help")),
        (["unmerge", "model"], ("--output", "adapt unmerge --help")),
    ],
)
def test_command_line_that_is_malformed(refused: Callable[..., None], arguments: list[str], says: tuple[str, ...]) -> None:
    refused(*arguments, says=says)


def edit(file: str, **changes: Any) -> None:
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | changes))


def edit_site(key: str, *value: object) -> None:
    """Change what torchgraft.json says of its first site, or take it out."""
    sites = json.loads(Path(NATIVE).read_text())["sites"]
    sites[0] = {name: old for name, old in sites[0].items() if name != key} | ({key: value[0]} if value else {})
    edit(NATIVE, sites=sites)


def remake(module: str) -> None:
    shutil.rmtree("adapter")
    make_adapter(Path("adapter"), module)


PEFT, NATIVE, TENSORS = "adapter/adapter_config.json", "native/torchgraft.json", "adapter/adapter_model.safetensors"
ADAPTERS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "adapter: no such directory": (lambda: shutil.rmtree("adapter"), ("adapter", "no such file or directory")),
    "adapter: no config": (lambda: Path(PEFT).unlink(), ("adapter_config.json",)),
    "adapter: config is no JSON": (lambda: Path(PEFT).write_text("{"), (PEFT, "JSON")),
    "adapter: no tensors": (lambda: Path(TENSORS).unlink(), ("adapter_model.safetensors", "missing")),
    "adapter: broken tensors": (lambda: os.truncate(TENSORS, 80), (TENSORS, "truncated")),
    "adapter: layer of another model": (lambda: remake(f"{Q}uery"), (f"{Q}uery", "no such layer", f"near names: {Q}")),
    "adapter: layer of another shape": (lambda: remake(V), (V, "[6, 2]", "[3, 2]")),
    "adapter: r of other tensors": (lambda: edit(PEFT, r=3), (f"{Q}.lora_A.weight", "[2, 6]", "[3, 6]")),
    "adapter: use_dora": (lambda: edit(PEFT, use_dora=True), ("lora_magnitude_vector", "is missing")),
    "adapter: unknown type": (lambda: edit(PEFT, peft_type="IA3"), ("'IA3'", "adapt plugins list")),
    "adapter: target_modules is a number": (lambda: edit(PEFT, target_modules=5), ("adapter_config.json", "target_modules")),
    "adapter: target_modules is no regex": (lambda: edit(PEFT, target_modules="("), ("adapter_config.json", "'('")),
    "adapter: modules_to_save is a number": (lambda: edit(PEFT, modules_to_save=5), ("adapter_config.json", "modules_to_save")),
    "adapter: rank_pattern is a list": (lambda: edit(PEFT, rank_pattern=[1]), ("adapter_config.json", "rank_pattern")),
    "adapter: rank_pattern is no regex": (lambda: edit(PEFT, rank_pattern={"(": 2}), ("adapter_config.json", "'('")),
    "native: later format": (lambda: edit(NATIVE, format=99), (NATIVE, "99", "upgrade")),
    "native: unknown method": (lambda: edit(NATIVE, method={"name": "lorra"}), ("'lorra'", "near names: lora")),
    "native: unknown setting": (lambda: edit(NATIVE, config={"rnk": 2}), ("'rnk'", "near names: rank")),
    "native: file outside": (lambda: edit(NATIVE, tensors={"file": f"../{TENSORS}", "sha256": ""}), (NATIVE,)),
    "native: other tensors": (lambda: shutil.copy(TENSORS, "native"), ("native", "hashes differ", "again")),
    "native: other weights": (lambda: (shutil.rmtree("model"), make_model(Path("model"), value=2.0)), (Q, "another model")),
    **{f"native: site without {key}": (lambda key=key: edit_site(key), (NATIVE,)) for key in ("name", "kind", "shape", "dtype", "config")},
    **{f"native: site whose {key} is 3": (lambda key=key: edit_site(key, 3), ()) for key in ("name", "kind", "shape", "config")},
}


@pytest.mark.parametrize("what", sorted(ADAPTERS))
def test_adapter_that_does_not_fit(adapt: Adapt, place: Path, refused: Callable[..., None], what: str) -> None:
    change, says = ADAPTERS[what]
    assert adapt("apply", "model", "--plugin", "lora", "--target", "q_proj", "-r", 2, "-o", "native").code == 0
    for name in ("native", "adapter"):
        assert adapt("merge", "model", name, "-o", "out", "--dry-run").code == 0
    name = what.partition(":")[0]
    change()
    refused("merge", "model", name, "-o", "out", says=says)
    refused("merge", "model", name, "-o", "out", "--dry-run", says=says)


OUTPUTS: dict[str, tuple[Callable[[], object], str, str]] = {
    "a directory": (lambda: Path("out").mkdir(), "out", "exists already"),
    "a file": (lambda: Path("out").touch(), "out", "exists already"),
    "a dangling link": (lambda: Path("out").symlink_to("nowhere"), "out", "exists already"),
    "the model itself": (lambda: None, "model", "exists already"),
    "below a file": (lambda: Path("file").touch(), "file/out", "cannot be written"),
    "deep below a file": (lambda: Path("file").touch(), "file/deep/out", "cannot be written"),
}


def every_writer(output: str) -> list[list[object]]:
    return [
        ["apply", "model", "--plugin", "lora", "-r", 2, "-o", output],
        ["merge", "model", "adapter", "-o", output],
        ["unmerge", "merged", "-o", output],
    ]


@pytest.mark.parametrize("what", sorted(OUTPUTS))
def test_output_that_cannot_be_made(adapt: Adapt, refused: Callable[..., None], what: str) -> None:
    prepare, output, says = OUTPUTS[what]
    prepare()
    assert adapt("merge", "model", "adapter", "-o", "merged").code == 0
    for command in every_writer(output):
        refused(*command, says=(output, says))


def test_output_beside_which_nothing_may_be_written(adapt: Adapt, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    assert adapt("merge", "model", "adapter", "-o", "merged").code == 0
    monkeypatch.setattr(tempfile, "mkdtemp", forbid)
    for command in every_writer("out"):
        refused(*command, says=("out", "Permission denied"))


def test_disk_that_is_full(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 990, 10))
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: pytest.fail("something was written"))
    refused("merge", "model", "adapter", "-o", "out", says=("out", "10 bytes free", "choose another output"))


@pytest.mark.parametrize("said", [True, None])
def test_tied_embeddings_whose_head_is_not_known(place: Path, refused: Callable[..., None], said: bool | None) -> None:
    """The head is the embedding's weight: config.json says so, or leaves it open and the file has no head."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 67}
    hf.BertForMaskedLM(hf.BertConfig(**sizes, tie_word_embeddings=True)).save_pretrained("tied")
    document = json.loads(Path("tied/config.json").read_text())
    assert document.pop("tie_word_embeddings") is True
    Path("tied/config.json").write_text(json.dumps(document | ({"tie_word_embeddings": True} if said else {})))
    make_adapter(place / "embedding", "bert.embeddings.word_embeddings", ((2, 67), (32, 2)))
    refused("merge", "tied", "embedding", "-o", "out", says=("word_embeddings", "output head", "tie_word_embeddings=False"))
