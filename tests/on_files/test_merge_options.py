"""What a merge of files can do beyond one adapter into the base's own files: each against a dense float64 reference."""

from __future__ import annotations

import errno
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchgraft as tg
from references import all_tensors, tree
from small_checkpoint import LAYERS, Small, make_adapter, write_model
from torchgraft.errors import ConfigError, FileFormatError, MergeError, TorchgraftWarning
from torchgraft.kinds import blocks
from torchgraft.rewriting.workers import Workers


def dense(folder: Path, weight: Tensor, layer: str, rank: int = 8, alpha: float = 16) -> Tensor:
    """ΔW of an adapter of the low-rank kind, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.lora_{letter}.weight"].double() for letter in "AB")
    return alpha / rank * (b @ a)


def dense_dora(folder: Path, weight: Tensor, layer: str) -> Tensor:
    """W' of a DoRA on `weight`, in float64."""
    v = weight.double() + dense(folder, weight, layer)
    m = load_file(folder / "adapter_model.safetensors")[f"base_model.model.{layer}.lora_magnitude_vector"].double()
    return m[:, None] * v / v.norm(dim=1, keepdim=True)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest, once: torch rounds twice from float64 to 16 bits, so the nearest of the neighbours is looked up."""
    first = exact.to(dtype)
    if dtype.itemsize > 2:
        return first
    bits = first.view(torch.int16)
    near = torch.stack([(bits + step).view(dtype) for step in (-1, 0, 1)])
    distance = (near.double() - exact).abs().nan_to_num(nan=torch.inf)
    odd = (near.view(torch.int16) & 1).double()
    return near.gather(0, torch.where(distance == distance.amin(0), odd, torch.inf).argmin(0, keepdim=True))[0]


def assert_close_to_once_rounded(found: Tensor, exact: Tensor) -> None:
    assert steps_between(found, rounded(exact, found.dtype)).max() <= 1
    if found.dtype != torch.float64:
        assert (found != rounded(exact, found.dtype)).sum() <= max(1, found.numel() // 100)


def steps_between(one: Tensor, other: Tensor) -> Tensor:
    """How many values of their dtype lie between them."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return (_ordered(one.view(bits)) - _ordered(other.view(bits))).abs()


def _ordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers in the order of their values: neighbours differ by one."""
    wide = bits.long()
    return torch.where(wide < 0, -(wide & torch.iinfo(bits.dtype).max), wide)


@pytest.fixture(params=[1 << 18, 20], ids=["whole", "blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor in one block, and in many."""
    monkeypatch.setitem(blocks.ENTRIES, "cpu", request.param)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_additive_adapters_are_summed_up_with_their_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_model(tmp_path / "base", Small(dtype), shards=2)
    adapters = [make_adapter(tmp_path / f"a{seed}", method, seed) for seed, method in enumerate(["lora", "loraplus", "lora"])]
    factors = dict(zip(adapters, [0.5, -1.25, 1.0], strict=True))
    report = tg.merge_checkpoint(base, factors, tmp_path / "out")
    assert (report.merged_tensors, report.verified, report.notes) == (3, True, ())
    before, found = all_tensors(base), all_tensors(tmp_path / "out")
    for name, tensor in found.items():
        layer = name.removesuffix(".weight")
        if layer in LAYERS:
            change = sum(factor * dense(adapter, before[name], layer) for adapter, factor in factors.items())
            assert_close_to_once_rounded(tensor, before[name].double() + change)
        else:
            assert tensor.equal(before[name])
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("methods", [("lora", "dora"), ("dora", "lora"), ("dora", "dora")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_depends_on_order_is_merged_in_the_given_one_and_says_so(tmp_path: Path, methods: tuple[str, str], dtype: torch.dtype) -> None:
    base = write_model(tmp_path / "base", Small(dtype))
    adapters = [make_adapter(tmp_path / f"a{seed}", method, seed) for seed, method in enumerate(methods)]
    report = tg.merge_checkpoint(base, dict.fromkeys(adapters, 1.0), tmp_path / "out")
    (note,) = report.notes
    assert note.startswith("merged in this order")
    assert note.index(str(adapters[0])) < note.index(str(adapters[1]))
    before, found = all_tensors(base), all_tensors(tmp_path / "out")
    for layer in LAYERS:
        exact = before[f"{layer}.weight"].double()
        for adapter, method in zip(adapters, methods, strict=True):
            exact = dense_dora(adapter, exact, layer) if method == "dora" else exact + dense(adapter, exact, layer)
        tolerance = {torch.bfloat16: 2**-8, torch.float32: 3e-7}[dtype]
        torch.testing.assert_close(found[f"{layer}.weight"].double(), exact, rtol=tolerance, atol=1e-9)
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", Small())
    lora, dora = make_adapter(tmp_path / "lora"), make_adapter(tmp_path / "dora", "dora")
    head = [make_adapter(tmp_path / f"head{seed}", seed=seed, also_train=["head"], targets=["q_proj"]) for seed in (0, 1)]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in lora.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    before = tree(tmp_path)
    cases: list[tuple[dict[str | Path, float], str]] = [
        ({dora: 0.5}, "dora makes depends on the weight.*0.5"),
        ({head[0]: 0.5}, r"head\.(weight|bias): .*fully trained.*0.5"),
        ({head[0]: 1.0, head[1]: 1.0}, r"head\.(weight|bias): .*another adapter"),
        ({lora: 1.0, copy: 1.0}, "copy: this adapter is given twice"),
    ]
    for adapters, match in cases:
        with pytest.raises(MergeError, match=match):
            tg.merge_checkpoint(base, adapters, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"dtype: 'int8'; it can be bfloat16"):
        tg.merge_checkpoint(base, lora, tmp_path / "out", dtype="int8")
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("written", ["float32", "bfloat16", "float16", "float64"])
def test_every_float_tensor_is_rounded_once_to_another_dtype(tmp_path: Path, stored: torch.dtype, written: str) -> None:
    base = write_model(tmp_path / "base", Small(stored), shards=3, config={"torch_dtype": "x", "text_config": {"dtype": "y", "size": 3}})
    adapter = make_adapter(tmp_path / "a", also_train=["head"])
    tg.merge_checkpoint(base, adapter, tmp_path / "out", dtype=written)
    before, found = all_tensors(base), all_tensors(tmp_path / "out")
    trained = load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        layer = name.removesuffix(".weight")
        assert str(tensor.dtype) == ("torch.int64" if name == "steps" else f"torch.{written}")
        if name == "steps":
            assert tensor.equal(before[name])
        elif name.startswith("head."):
            assert tensor.equal(trained[f"base_model.model.{name}"].to(tensor.dtype))
        else:
            change = dense(adapter, before[name], layer) if layer in LAYERS else 0
            exact = before[name].double() + change
            if written == "float64":
                torch.testing.assert_close(tensor, exact, rtol=1e-14, atol=1e-15)
            else:
                assert_close_to_once_rounded(tensor, exact)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"], config["text_config"]) == (written, written, {"dtype": written, "size": 3})
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_a_dtype_that_cannot_hold_a_value_is_refused(tmp_path: Path) -> None:
    model = Small(torch.float32)
    with torch.no_grad():
        model.embed_tokens.weight[3, 2] = 1e6
    base, adapter = write_model(tmp_path / "base", model), make_adapter(tmp_path / "a")
    with pytest.raises(MergeError, match=r"embed_tokens\.weight: it has values outside the range of torch\.float16"):
        tg.merge_checkpoint(base, adapter, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("shards", "size", "files"), [(1, 400, 5), (3, 400, 5), (3, 10**6, 1), (2, 1, 9)])
def test_files_are_cut_again_and_restored_as_they_were(tmp_path: Path, shards: int, size: int, files: int) -> None:
    base, adapter = write_model(tmp_path / "base", Small(), shards=shards), make_adapter(tmp_path / "a")
    plain = tg.merge_checkpoint(base, adapter, tmp_path / "plain")
    report = tg.merge_checkpoint(base, adapter, tmp_path / "out", max_shard_size=size)
    assert len(plain.files) == shards
    found = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert found == sorted(report.files)
    index = tmp_path / "out" / "model.safetensors.index.json"
    if size == 10**6:
        assert (found, index.exists()) == (["model.safetensors"], False)
    else:
        assert len(found) > 1
        document = json.loads(index.read_text())
        tensors = all_tensors(tmp_path / "out")
        assert document["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert document["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
        assert (shards == 1) == ("made" not in document["metadata"])
        for path in found:
            with safe_open(tmp_path / "out" / path, "pt") as file:
                own = list(file.keys())
                assert file.metadata() == {"format": "pt"}
            assert {name for name, where in document["weight_map"].items() if where == path} == set(own)
            assert len(own) == 1 or sum(tensors[name].nbytes for name in own) <= size
    one, other = all_tensors(tmp_path / "plain"), all_tensors(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_a_dry_run_says_what_would_be_and_writes_nothing(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small(), shards=2), make_adapter(tmp_path / "a")
    before = tree(tmp_path)
    plan = tg.merge_checkpoint(base, adapter, tmp_path / "out", dry_run=True, max_shard_size=300)
    assert tree(tmp_path) == before
    report = tg.merge_checkpoint(base, adapter, tmp_path / "out", max_shard_size=300)
    same = ("merged_tensors", "copied_tensors", "total_bytes", "files", "notes", "memory")
    assert [getattr(plan, key) for key in same] == [getattr(report, key) for key in same]
    assert report.total_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert (plan.verified, report.verified) == (False, True)
    assert plan.undo_bytes > 0


def test_a_dry_run_tells_that_the_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 990, 10))
    (note,) = tg.merge_checkpoint(base, adapter, tmp_path / "out", dry_run=True).notes
    assert note.startswith("it would be refused: the disk has 10 bytes free")


def test_progress_tells_every_byte_and_of_how_many(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small(), shards=2), make_adapter(tmp_path / "a")
    reported: list[tuple[int, int]] = []
    report = tg.merge_checkpoint(base, adapter, tmp_path / "out", dtype="float32", progress=lambda *numbers: reported.append(numbers))
    headers = sum(8 + int.from_bytes((tmp_path / "out" / file).read_bytes()[:8], "little") for file in report.files)
    assert {total for _, total in reported} == {report.total_bytes}
    assert sum(written for written, _ in reported) == report.total_bytes - headers


@pytest.mark.parametrize(("scale", "rank"), [(0.001, 4), (0.02, 16), (0.2, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_is_the_float64_sum(tmp_path: Path, dtype: torch.dtype, scale: float, rank: int) -> None:
    """In 999,424 entries, many of them where W and its change nearly cancel."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"q_proj": nn.Linear(976, 1024, bias=False)})
    a, b = torch.randn(rank, 976) * 0.02, torch.randn(1024, rank) * scale
    with torch.no_grad():
        model["q_proj"].weight.normal_(0, 0.02)
        model["q_proj"].weight[::8] = -2 * (b @ a)[::8] * (1 + 2.0 ** -torch.randint(6, 22, (128, 976)))
    base = write_model(tmp_path / "base", model.to(dtype))
    (tmp_path / "a").mkdir()
    names = {f"base_model.model.q_proj.lora_{letter}.weight": tensor.contiguous() for letter, tensor in (("A", a), ("B", b))}
    save_file(names, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    tg.merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    exact = model["q_proj"].weight.detach().double() + 2 * (b.double() @ a.double())
    expected, found = rounded(exact, dtype), all_tensors(tmp_path / "out")["q_proj.weight"]
    assert steps_between(found, expected).max() <= 1
    assert (found != expected).double().mean() <= 1e-4
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_a_directory_that_an_interrupted_run_left_is_reported(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    left = tmp_path / ".out.abc.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"1234567")
    with pytest.warns(TorchgraftWarning, match=r"\.out\.abc\.partial: left over from an interrupted run \(7 bytes\); delete it"):
        tg.merge_checkpoint(base, adapter, tmp_path / "out")
    assert left.exists()


def test_a_factor_holds_beside_a_method_that_depends_on_the_weight(tmp_path: Path) -> None:
    """And where the adapters share some layers only."""
    base = write_model(tmp_path / "base", Small(torch.float32))
    lora = make_adapter(tmp_path / "lora", targets=["q_proj", "up_proj"])
    dora = make_adapter(tmp_path / "dora", "dora", 1, targets=["q_proj", "down_proj"])
    for number, adapters in enumerate([{lora: 0.5, dora: 1.0}, {dora: 1.0, lora: -2.0}]):
        out = tmp_path / f"out{number}"
        tg.merge_checkpoint(base, adapters, out)
        before, found = all_tensors(base), all_tensors(out)
        for layer, own in (("q_proj", adapters), ("up_proj", [lora]), ("down_proj", [dora])):
            exact = before[f"{layer}.weight"].double()
            for adapter in own:
                exact = dense_dora(dora, exact, layer) if adapter == dora else exact + adapters[lora] * dense(lora, exact, layer)
            torch.testing.assert_close(found[f"{layer}.weight"].double(), exact, rtol=3e-7, atol=1e-9)
        tg.unmerge_checkpoint(out, tmp_path / f"back{number}")
        assert tree(tmp_path / f"back{number}") == tree(base)


def test_entries_that_are_not_finite_in_the_base_stay_so(tmp_path: Path) -> None:
    model = Small(torch.float32)
    with torch.no_grad():
        model.q_proj.weight[0, :2] = torch.tensor([torch.inf, torch.nan])
        model.embed_tokens.weight[3] = -torch.inf
    base = write_model(tmp_path / "base", model)
    tg.merge_checkpoint(base, make_adapter(tmp_path / "a", model=model), tmp_path / "out", dtype="bfloat16")
    found = all_tensors(tmp_path / "out")
    assert found["q_proj.weight"][0, 0] == torch.inf
    assert found["q_proj.weight"][0, 1].isnan()
    assert (found["embed_tokens.weight"][3] == -torch.inf).all()
    assert found["q_proj.weight"].isfinite().sum() == 62
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


@pytest.mark.parametrize(
    ("adapters", "options"),
    [({}, {}), ({"a": math.inf}, {}), ({"a": 1.0}, {"onto": "orignal"}), ({"a": 1.0}, {"max_shard_size": -5})],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path: Path, adapters: dict[str, float], options: dict[str, Any]) -> None:
    base = write_model(tmp_path / "base", Small())
    make_adapter(tmp_path / "a")
    with pytest.raises(ConfigError):
        tg.merge_checkpoint(base, {tmp_path / name: factor for name, factor in adapters.items()}, tmp_path / "out", **options)


@pytest.mark.parametrize("answer", [OSError(errno.EXDEV, ""), OSError(errno.EPERM, ""), 0])
def test_bytes_are_copied_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    base, adapter = write_model(tmp_path / "base", Small()), make_adapter(tmp_path / "a")
    tg.merge_checkpoint(base, adapter, tmp_path / "right")
    copying = Mock(side_effect=answer if isinstance(answer, OSError) else None, return_value=answer)
    monkeypatch.setattr("os.copy_file_range", copying)
    tg.merge_checkpoint(base, adapter, tmp_path / "out")
    assert copying.called
    assert tree(tmp_path / "out") == tree(tmp_path / "right")


def test_an_error_stops_the_work_on_other_tensors(tmp_path: Path) -> None:
    started: list[int] = []
    workers = Workers()

    def work(item: int) -> None:
        started.append(item)
        if item == 1:
            raise FileFormatError("one")
        for _ in range(1000):
            time.sleep(0.005)
            workers.advance(0)

    before = time.monotonic()
    with pytest.raises(FileFormatError, match="one"):
        list(workers.map(work, range(20)))
    assert time.monotonic() - before < 4
    assert len(started) < 20
