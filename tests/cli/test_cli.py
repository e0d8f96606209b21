"""The commands: what they print, with and without --json, and what they write."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from command import Result
from saved_adapters import edit_tensors
from torchgraft.method.config import LowRankConfig

Adapt = Callable[..., Result]


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor → shape, as the safetensors library sees it."""
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  (it is no dict)


def numel(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def lora_params(shapes: dict[str, tuple[int, ...]], expression: str, rank: int) -> int:
    """Σ r·(d + k) over the weights whose names match."""
    return sum(rank * sum(shape) for name, shape in shapes.items() if re.fullmatch(expression, name))


def parsed(result: Result) -> Any:
    """The one JSON document on stdout of a command that went well and had nothing to say on stderr."""
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("\n")
    return json.loads(result.out)


def hashes(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


TREE = """\
module                    kind       shape   dtype     params  bytes    share
(model)                   other      scalar  bfloat16       1    2 B   0.45 %
lm_head                   Linear     10×4    bfloat16      40   80 B  17.94 %
model                                                     182  364 B  81.61 %
  embed_tokens            Embedding  10×4    bfloat16      40   80 B  17.94 %
  layers                                                  138  276 B  61.88 %
    0-2 ×3                                                 96  192 B  43.05 %
      input_layernorm     norm       4       bfloat16       4    8 B   1.79 %
      self_attn                                            28   56 B  12.56 %
        q_proj            Linear     4×4     bfloat16      20   40 B   8.97 %
        v_proj            Linear     2×4     bfloat16       8   16 B   3.59 %
    3                                                      42   84 B  18.83 %
      input_layernorm     norm       4       bfloat16       4    8 B   1.79 %
      self_attn                                            38   76 B  17.04 %
        q_proj            Linear     6×4     bfloat16      30   60 B  13.45 %
        v_proj            Linear     2×4     bfloat16       8   16 B   3.59 %
  norm                    norm       4       bfloat16       4    8 B   1.79 %

16 modules, 223 parameters, 446 B
"""
# v_proj of a block: 1·(2 + 4) = 6 parameters, q_proj: 1·(4 + 4) = 8, in the last block 1·(6 + 4) = 10; dense 3·(16 + 8) + 24 + 8 = 104.
SELECTED = """\
module                    kind       shape   dtype     params  bytes    share  lora trains  of dense
(model)                   other      scalar  bfloat16       1    2 B   0.45 %
lm_head                   Linear     10×4    bfloat16      40   80 B  17.94 %
model                                                     182  364 B  81.61 %           58   31.87 %
  embed_tokens            Embedding  10×4    bfloat16      40   80 B  17.94 %
  layers                                                  138  276 B  61.88 %           58   42.03 %
    0-2 ×3                                                 96  192 B  43.05 %           42   43.75 %
    3                                                      42   84 B  18.83 %           16   38.10 %
  norm                    norm       4       bfloat16       4    8 B   1.79 %

8 of 16 modules selected: @attention 8
lora trains 58 parameters: 55.77 % of the 104 in the selected layers, 26.01 % of the model's 223

memory for training (with Adam, without activations):
method    trained  weights  adapter  gradients  optimizer    total
full          223    446 B      0 B      446 B      892 B  1.7 KiB
adalora        58    446 B    232 B      232 B      464 B  1.3 KiB
dora           84    446 B    336 B      336 B      672 B  1.7 KiB
lora           58    446 B    232 B      232 B      464 B  1.3 KiB
loraplus       58    446 B    232 B      232 B      464 B  1.3 KiB
qlora          58    290 B    232 B      232 B      464 B  1.2 KiB
"""


@pytest.mark.parametrize(
    ("options", "expected"), [([], TREE), (["--target", "@attention", "--plugin", "lora", "-r", 1, "--depth", 3], SELECTED)]
)
def test_inspect_prints_the_folded_tree(adapt: Adapt, tiny: Path, options: list[object], expected: str) -> None:
    result = adapt("inspect", tiny, *options)
    assert (result.code, result.err) == (0, "")
    assert "".join(f"{line.rstrip()}\n" for line in result.out.splitlines()) == expected


def numbers(line: str) -> set[str]:
    return set(re.findall(r"\d[\d.,]*", line))


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("options", [[], ["--target", "@attention", "-r", 1]])
def test_narrow_terminal_shortens_no_number(
    adapt: Adapt, tiny: Path, monkeypatch: pytest.MonkeyPatch, columns: int, options: list[object]
) -> None:
    wide = adapt("inspect", tiny, *options).out.splitlines()
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = adapt("inspect", tiny, *options).out.splitlines()
    assert max(map(len, narrow)) <= columns
    for line, whole in zip(narrow[1:17], wide[1:17], strict=True):
        params = re.findall(r"(\S+) +\d+ B ", whole)
        assert set(params) <= numbers(line) <= numbers(whole), line


def test_inspect_json_of_a_model(adapt: Adapt, bert: Path) -> None:
    shapes = shapes_of(bert)
    document = parsed(adapt("inspect", bert, "--json"))
    assert document.keys() == {"total_params", "total_bytes", "modules"}
    assert document["total_params"] == numel(shapes) == sum(module["params"] for module in document["modules"])
    assert document["total_bytes"] == 4 * numel(shapes)
    assert {module["name"] for module in document["modules"]} == {name.rpartition(".")[0] for name in shapes}
    query = "bert.encoder.layer.1.attention.self.query"
    found = next(module for module in document["modules"] if module["name"] == query)
    expected = {"kind": "Linear", "role": "attention", "shape": [32, 32], "dtype": "float32", "params": 32 * 32 + 32}
    assert found == {"name": query, **expected}


def test_inspect_json_of_a_selection(adapt: Adapt, llama: Path) -> None:
    shapes = shapes_of(llama)
    options = ["--target", "*.{q,v}_proj", "--target", "@mlp", "--target", "!down_proj", "--layers", "1", "-r", 3]
    document = parsed(adapt("inspect", llama, *options, "--plugin", "lora", "--json"))
    trainable = lora_params(shapes, r".*\.1\..*(q_proj|v_proj|gate_proj|up_proj).weight", 3)
    assert document["patterns"] == {"*.{q,v}_proj": 2, "@mlp": 3, "!down_proj": 1}
    assert document["matched"] == len(document["sites"]) == 4
    assert document["total_params"] == numel(shapes)
    assert document["trainable_params"] == trainable
    assert document["trainable_percent"] == pytest.approx(100 * trainable / numel(shapes))


def test_overrides_settings_and_whole_modules_are_counted(adapt: Adapt, bert: Path) -> None:
    shapes = shapes_of(bert)
    options = ["--set", "rank=4", "--override", "value", "rank=2", "--override", "*.0.*.value", "rank=1", "--also-train", "classifier"]
    document = parsed(adapt("inspect", bert, "--target", "query", "--target", "value", *options, "--json"))
    query, value = (lora_params(shapes, rf".*{name}.weight", 1) for name in ("query", "value"))
    assert document["also_train"] == ["classifier"]
    assert document["trainable_params"] == 4 * query + 2 * value / 2 + 1 * value / 2 + numel({"w": (3, 32), "b": (3,)})


def test_apply_writes_what_it_says(adapt: Adapt, bert: Path, tmp_path: Path) -> None:
    options = ["--target", "query", "--layers", 1, "-r", 2, "--alpha", 6, "--also-train", "classifier", "--seed", 5]
    command = ["apply", bert, "--plugin", "lora", *options]
    document = parsed(adapt(*command, "-o", tmp_path / "a", "--json"))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    prefix = "base_model.model."
    site = f"{prefix}bert.encoder.layer.1.attention.self.query"
    base = load_file(bert / "model.safetensors")
    assert tensors.keys() == {f"{site}.lora_A.weight", f"{site}.lora_B.weight", *(f"{prefix}classifier.{x}" for x in ("weight", "bias"))}
    assert (document["method"], document["output"], document["matched"]) == ("lora", str(tmp_path / "a"), 1)
    assert document["trainable_params"] == sum(tensor.numel() for tensor in tensors.values()) == 2 * (32 + 32) + 3 * 32 + 3
    assert tensors[f"{site}.lora_A.weight"].abs().amax() > 0
    assert not tensors[f"{site}.lora_B.weight"].any()
    assert tensors[f"{prefix}classifier.weight"].equal(base["classifier.weight"])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (2, 6, ["classifier"])
    for seed, same in ((5, True), (6, False)):
        result = adapt(*command, "--seed", seed, "-o", tmp_path / f"seed{seed}")
        assert (result.code, result.err, result.out.splitlines()[-1]) == (0, "", f"wrote {tmp_path / f'seed{seed}'}")
        assert (hashes(tmp_path / f"seed{seed}") == hashes(tmp_path / "a")) == same


def test_dry_run_writes_nothing(adapt: Adapt, llama: Path, tmp_path: Path) -> None:
    adapter, out = tmp_path / "a", tmp_path / "new" / "out"
    apply = ["apply", llama, "--plugin", "lora", "--target", "q_proj"]
    assert adapt(*apply, "-o", adapter).code == 0
    before = [sorted(tmp_path.rglob("*")), hashes(llama)]
    for command, key in (([*apply, "-o", out], "trainable_params"), (["merge", llama, adapter, "-o", out], "merged_tensors")):
        document = parsed(adapt(*command, "--dry-run", "--json"))
        assert document["output"] is None
        assert document[key] == {"trainable_params": 2 * 8 * 64, "merged_tensors": 2}[key]
        assert f"{out}" in adapt(*command, "--dry-run").out
    assert [sorted(tmp_path.rglob("*")), hashes(llama)] == before


def shifted(tensors: dict[str, torch.Tensor]) -> None:
    """Move an adapter away from its initialization, at which it changes nothing."""
    for tensor in tensors.values():
        tensor += 0.1


def test_check_merge_and_unmerge(adapt: Adapt, llama: Path, bert: Path, tmp_path: Path) -> None:
    adapter, out, back = tmp_path / "a", tmp_path / "out", tmp_path / "back"
    assert adapt("apply", llama, "--plugin", "lora", "--target", "{q,v}_proj", "-o", adapter).code == 0
    edit_tensors(adapter, shifted)
    assert parsed(adapt("check", llama, adapter, "--json")) == {"ok": True, "problems": [], "renamed": {}, "notes": []}
    assert adapt("check", llama, adapter).out == f"{adapter} fits {llama}\n"
    wrong = adapt("check", bert, adapter, "--json")
    assert (wrong.code, wrong.err) == (2, "")
    problems = json.loads(wrong.out)["problems"]
    assert {f"model.layers.{block}.self_attn.{x}_proj" for block in (0, 1) for x in "qv"} <= {problem.split(":")[0] for problem in problems}
    assert adapt("check", bert, adapter) == Result(2, "".join(f"problem: {problem}\n" for problem in problems), "")
    merged = parsed(adapt("merge", llama, adapter, "-o", out, "--json"))
    assert (merged["output"], merged["merged_tensors"], merged["copied_tensors"]) == (str(out), 4, len(shapes_of(llama)) - 4)
    assert (merged["verified"], merged["left_out"]) == (True, [])
    assert merged["total_bytes"] == (llama / "model.safetensors").stat().st_size
    restored = parsed(adapt("unmerge", out, "-o", back, "--json"))
    assert (restored["output"], restored["restored_tensors"], restored["files"]) == (str(back), 4, len(hashes(llama)))
    assert hashes(back) == hashes(llama)
    assert list(merged["changed"].values()) == [1.0] * 4


def test_an_adapter_that_changes_nothing_is_merged_only_if_told(adapt: Adapt, llama: Path, tmp_path: Path) -> None:
    adapter, out = tmp_path / "a", tmp_path / "out"
    assert adapt("apply", llama, "--plugin", "lora", "--target", "{q,v}_proj", "-o", adapter).code == 0
    checked = adapt("check", llama, adapter)
    assert checked.code == 0
    assert "note: the adapter changes nothing on 4 of its 4 layers (model.layers.0.self_attn.q_proj, " in checked.out
    refused = adapt("merge", llama, adapter, "-o", out)
    assert (refused.code, refused.out, out.exists()) == (2, "", False)
    assert "4 of 4 merged tensors are the base's, unchanged" in refused.err
    assert "--allow-unchanged" in refused.err
    allowed = adapt("merge", llama, adapter, "-o", out, "--allow-unchanged")
    assert allowed.code == 0
    assert "note: 4 of 4 merged tensors are the base's, unchanged" in allowed.out
    assert "changed: 0.0 % of the entries" in allowed.out


def test_merge_and_unmerge_as_text(adapt: Adapt, llama: Path, tmp_path: Path) -> None:
    assert adapt("apply", llama, "--plugin", "lora", "-o", tmp_path / "a").code == 0
    edit_tensors(tmp_path / "a", shifted)
    for options, says in (
        ([], ["14 tensors merged", "changed: 100.0 % of the entries", "verified:", "undo record"]),
        (["--no-verify", "--no-undo"], ["not verified", "--no-undo"]),
    ):
        out = tmp_path / f"out{len(options)}"
        result = adapt("merge", llama, tmp_path / "a", "-o", out, *options)
        assert (result.code, result.err) == (0, "")
        assert [word for word in [f"wrote {out}", *says] if word not in result.out] == []
    result = adapt("unmerge", tmp_path / "out0", "-o", tmp_path / "back")
    said = "the sha256 of every tensor and of all 3 files is that of the original"
    assert result.out == f"wrote {tmp_path / 'back'}: 14 tensors restored, 7 copied\n{said}\n"


def test_plugins_list(adapt: Adapt) -> None:
    found = {entry["name"]: entry for entry in parsed(adapt("plugins", "list", "--json"))}
    installed = [point for point in entry_points(group="torchgraft") if point.dist and point.dist.name == "torchgraft"]
    assert "lora" in found
    for point in installed:
        expected = {"distribution": "torchgraft", "version": version("torchgraft"), "entry_point": point.value, "error": None}
        assert found[point.name].items() >= {"name": point.name, **expected}.items()
        assert "adapter_merge" in found[point.name]["provides"]
        assert point.name in adapt("plugins", "list").out


def test_plugins_show(adapt: Adapt) -> None:
    document = parsed(adapt("plugins", "show", "lora", "--json"))
    defaults = LowRankConfig().model_dump()
    assert (document["name"], document["distribution"], document["kinds"]) == ("lora", "torchgraft", None)
    assert {option["name"]: option["default"] for option in document["options"]} == defaults
    text = adapt("plugins", "show", "lora").out
    for option in document["options"]:
        assert option["help"]
        assert option["values"]
        assert re.search(rf"^{option['name']} +{re.escape(str(option['default']))} ", text, re.MULTILINE)


def test_bare_command_shows_its_help(adapt: Adapt) -> None:
    for command in ([], ["plugins"]):
        result = adapt(*command)
        assert "Commands:" in result.out + result.err
        assert "error:" not in result.out + result.err


@pytest.mark.parametrize("message", ["boom", "CUDA error\nat frame #0\nat frame #1"])
def test_a_bug_is_one_line_and_its_traceback_on_request(adapt: Adapt, tiny: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("torchgraft.checkpoint.reading.open_checkpoint", broken)
    short, long = adapt("inspect", tiny), adapt("--debug", "inspect", tiny)
    assert (short.code, short.out, long.code, long.out) == (1, "", 1, "")
    assert re.fullmatch(r"error: .*RuntimeError: (boom|CUDA error).*--debug.*\n", short.err)
    assert "Traceback (most recent call last)" in long.err
    assert "in broken" in long.err


def test_interrupted_command_says_so(adapt: Adapt, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchgraft.checkpoint.reading.open_checkpoint", interrupt)
    result = adapt("inspect", tiny)
    assert (result.code, result.out, result.err.strip()) == (130, "", "error: interrupted; nothing was left behind")


def test_version(adapt: Adapt) -> None:
    assert adapt("--version") == Result(0, f"adapt, version {version('torchgraft')}\n", "")


def test_what_the_files_do_not_tell_is_asked_for_and_not_left_out(adapt: Callable[..., Result], tmp_path: Path) -> None:
    tensors = {"h.0.c_proj.weight": torch.zeros(4, 4), "h.0.c_proj.bias": torch.zeros(4), "h.0.fc1.weight": torch.zeros(6, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    for target in ("@linear", "*c_proj", "c_proj"):
        refused = adapt("inspect", tmp_path, "--target", target)
        assert (refused.code, refused.out) == (2, "")
        assert "--kind 'h.0.c_proj=Linear'" in refused.err
    told = adapt("inspect", tmp_path, "--target", "@linear", "--kind", "c_proj=Conv1D", "-r", 2, "--json")
    assert json.loads(told.out)["sites"] == ["h.0.c_proj", "h.0.fc1"]
    assert json.loads(adapt("inspect", tmp_path, "--target", "@linear", "--target", "!c_proj", "-r", 2, "--json").out)["matched"] == 1


def test_names_in_files_cannot_forge_lines_or_steer_the_terminal(adapt: Adapt, llama: Path, tmp_path: Path) -> None:
    assert adapt("apply", llama, "--plugin", "lora", "-o", tmp_path / "a").code == 0
    record = json.loads((tmp_path / "a" / "torchgraft.json").read_text())
    record["sites"][0]["name"] = "x\nproblem: forged \x1b[2J"
    (tmp_path / "a" / "torchgraft.json").write_text(json.dumps(record))
    for result in (adapt("check", llama, tmp_path / "a"), adapt("merge", llama, tmp_path / "a", "-o", tmp_path / "out")):
        assert result.code == 2
        assert "\x1b" not in result.out + result.err
        assert not any(line.startswith("problem: forged") for line in result.out.splitlines())
    assert len(result.err.splitlines()) == 1


def test_a_site_that_is_recorded_twice_is_refused(adapt: Adapt, llama: Path, tmp_path: Path) -> None:
    assert adapt("apply", llama, "--plugin", "lora", "-o", tmp_path / "a").code == 0
    record = json.loads((tmp_path / "a" / "torchgraft.json").read_text())
    record["sites"].append(record["sites"][0])
    (tmp_path / "a" / "torchgraft.json").write_text(json.dumps(record))
    result = adapt("check", llama, tmp_path / "a")
    assert (result.code, "lists it twice" in result.out) == (2, True)
