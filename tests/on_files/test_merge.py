"""Merging and unmerging through files: the values, the bytes beside them, the way back, and what is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
import torchgraft as tg
from references import tree
from torchgraft.errors import FileFormatError, MergeError, TorchgraftError
from torchgraft.rewriting import file_tensors

ADAPTED: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": {
        "model.embed_tokens": (11, 6),
        "model.layers.0.self_attn.q_proj": (8, 8),
        "model.layers.0.mlp.up_proj": (12, 8),
        "model.layers.0.mlp.down_proj": (8, 12),
        "stem.conv": (5, 3, 2, 4),
        "stem.conv1": (6, 4, 3),
    },
    "gpt2": {"h.0.attn.c_attn": (8, 24), "h.0.attn.c_proj": (8, 8), "h.0.mlp.c_proj": (20, 8), "wpe": (9, 9)},
}
TRANSPOSED = ("embed_tokens", "wpe", "c_attn", "c_proj")
"""Last segments whose weight is stored (in, out): embeddings, and GPT-2's Conv1D."""
RANK, ALPHA = 3, 5.0

Factors = dict[str, tuple[Tensor, Tensor]]
Merge = Callable[..., Path]


def randn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TRAINED = {"ln_f.weight": randn(7, 8).float(), "ln_f.bias": randn(8, 8).float()}


def weights(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is adapted, and between it tensors of every sort that are not."""
    found = {f"{name}.weight": randn(seed, *shape, scale=0.3).to(dtype) for seed, (name, shape) in enumerate(ADAPTED[family].items())}
    first = next(iter(ADAPTED[family]))
    return found | {
        "ln_f.weight": torch.ones(8, dtype=dtype),
        "ln_f.bias": torch.ones(8, dtype=dtype),
        f"{first}.scales": randn(99, 4).to(torch.float8_e4m3fn),
        "position_ids": torch.arange(7),
        "empty.weight": torch.empty(0, 8, dtype=dtype),
        "step": torch.tensor(3, dtype=torch.int32),
    }


def write_base(folder: Path, family: str, dtype: torch.dtype, *, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    tensors = weights(family, dtype)
    (folder / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": 8}))
    files = {name: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, name in enumerate(tensors)}
    if shards == 1:
        files = dict.fromkeys(tensors, "model.safetensors")
    else:
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=3))
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file, {"format": "pt"})
    return folder


def factors_of(family: str, seed: int = 50, scale: float = 0.4) -> Factors:
    """Layer → random A (r, in) and B (out, r), in float32 as adapters are."""
    found = {}
    for number, (name, shape) in enumerate(ADAPTED[family].items()):
        outputs, inputs = shape[::-1] if name.endswith(TRANSPOSED) else (shape[0], prod(shape[1:]))
        a, b = randn(seed + 2 * number, RANK, inputs, scale=scale), randn(seed + 2 * number + 1, outputs, RANK, scale=scale)
        found[name] = (a.float(), b.float())
    return found


def write_adapter(folder: Path, family: str, factors: Factors) -> Path:
    """An adapter as PEFT writes it, made by hand; the norm is fully trained."""
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in TRAINED.items()}
    for name, (a, b) in factors.items():
        kernel = ADAPTED[family][name][2:]
        letters = ("embedding_A", "embedding_B") if name.endswith(("embed_tokens", "wpe")) else ("A.weight", "B.weight")
        shapes = ((RANK, -1, *kernel), (-1, RANK, *(1 for _ in kernel)))
        for letter, tensor, shape in zip(letters, (a, b), shapes, strict=True):
            tensors[f"base_model.model.{name}.lora_{letter}"] = tensor.reshape(shape)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(factors), "modules_to_save": ["ln_f"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def reference(family: str, dtype: torch.dtype, factors: Factors) -> dict[str, Tensor]:
    """W + (α/r)·B·A in float64, rounded once to `dtype`."""
    merged = {name: tensor.to(dtype) for name, tensor in TRAINED.items()}
    for name, (a, b) in factors.items():
        weight = weights(family, dtype)[f"{name}.weight"]
        delta = ALPHA / RANK * (b.double() @ a.double())
        delta = delta.t() if name.endswith(TRANSPOSED) else delta.reshape(weight.shape)
        merged[f"{name}.weight"] = (weight.double() + delta).to(dtype)
    return merged


def assert_rounded_once(found: Tensor, expected: Tensor) -> None:
    """Up to 1 in 100 entries may lie one step of the dtype away, where float32 arithmetic falls across a rounding boundary."""
    assert found.dtype == expected.dtype
    if found.element_size() > 2:
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[found.dtype]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        return
    steps = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).sum() <= max(1, found.numel() // 100)


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", sorted(ADAPTED))
def test_merged_tensors_are_the_reference_and_all_else_is_unchanged(tmp_path: Path, family: str, dtype: torch.dtype, shards: int) -> None:
    base, factors = write_base(tmp_path / "base", family, dtype, shards=shards), factors_of(family)
    report = tg.merge_checkpoint(base, write_adapter(tmp_path / "adapter", family, factors), tmp_path / "out")
    expected, before, found = reference(family, dtype, factors), weights(family, dtype), dict[str, Tensor]()
    assert (report.merged_tensors, report.copied_tensors, report.verified) == (len(expected), len(before) - len(expected), True)
    for file in sorted(base.glob("*.safetensors")):
        length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert (tmp_path / "out" / file.name).read_bytes()[:length] == file.read_bytes()[:length]
        found |= load_file(tmp_path / "out" / file.name)
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        if name in expected:
            assert_rounded_once(tensor, expected[name])
        else:
            assert raw(tensor).equal(raw(before[name])), name
    for file in base.glob("*.json"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_single_file_is_merged_and_given_back(tmp_path: Path) -> None:
    """The directory's config.json has the kinds; it is not beside the merged file, and unmerge must not need it."""
    base, factors = write_base(tmp_path / "base", "gpt2", torch.bfloat16), factors_of("gpt2")
    file = (base / "model.safetensors").rename(base / "gpt.safetensors")
    tg.merge_checkpoint(file, write_adapter(tmp_path / "adapter", "gpt2", factors), tmp_path / "out")
    for name, tensor in reference("gpt2", torch.bfloat16, factors).items():
        assert_rounded_once(load_file(tmp_path / "out" / "gpt.safetensors")[name], tensor)
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == {"gpt.safetensors": tree(base)["gpt.safetensors"]}


def test_rows_smaller_than_a_normal_float16_pass_the_verification(tmp_path: Path) -> None:
    base, factors = write_base(tmp_path / "base", "llama", torch.float16), factors_of("llama", scale=1e-3)
    small = {name: (tensor * 1e-5 if name.endswith("proj.weight") else tensor) for name, tensor in weights("llama", torch.float16).items()}
    save_file(small, base / "model.safetensors")
    assert tg.merge_checkpoint(base, write_adapter(tmp_path / "adapter", "llama", factors), tmp_path / "out", allow_unchanged=True).verified
    name = "model.layers.0.mlp.up_proj"
    expected = small[f"{name}.weight"].double() + ALPHA / RANK * (factors[name][1].double() @ factors[name][0].double())
    assert_rounded_once(load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"], expected.half())


AUTO = {
    "llama": (hf.AutoModelForCausalLM, ["*.{q,v}_proj", "down_proj", "embed_tokens"]),
    "bert": (hf.AutoModelForSequenceClassification, ["query", "@mlp", "word_embeddings"]),
    "gpt2": (hf.AutoModelForCausalLM, ["c_attn", "c_proj", "wpe"]),
}


@pytest.mark.parametrize("family", sorted(AUTO))
def test_transformers_loads_the_merged_directory_as_the_adapted_model(tmp_path: Path, family: str) -> None:
    auto, targets = AUTO[family]
    model = models.build(family)
    model.save_pretrained(tmp_path / "base")
    x = torch.arange(3, 15).reshape(2, 6)
    plain = model(input_ids=x).logits.detach()
    adapter = tg.apply(model, "lora", targets=targets, rank=4, alpha=6, also_train=["classifier"] if family == "bert" else [])
    models.perturb_(list(adapter.parameters()))
    adapted = model(input_ids=x).logits.detach()
    adapter.save(tmp_path / "adapter")
    tg.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    loaded = auto.from_pretrained(tmp_path / "out").eval()(input_ids=x).logits.detach()
    assert (adapted - plain).abs().max() > 0.01
    torch.testing.assert_close(loaded, adapted, rtol=1e-4, atol=1e-5)
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "base")


@pytest.fixture
def case(tmp_path: Path) -> Merge:
    """A base, an adapter for it, and a function that merges them: into `out` by default."""
    base = write_base(tmp_path / "base", "llama", torch.bfloat16, shards=2)
    (base / "tokenizer.json").write_text("{}")
    write_adapter(tmp_path / "adapter", "llama", factors_of("llama"))

    def merge(source: str = "base", adapter: str = "adapter", output: str = "out", **options: Any) -> Path:
        tg.merge_checkpoint(tmp_path / source, tmp_path / adapter, tmp_path / output, **options)
        return tmp_path / output

    return merge


SIDECARS = {
    "generation_config.json": b'{"top_k": 3}',
    "tokenizer.model": bytes(range(256)),
    "chat_template.jinja": "{{ messages }} ü".encode(),
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "training_args.bin": b"not the weights",
    ".gitattributes": b"*.safetensors lfs",
}
STALE = ["pytorch_model.bin", "pytorch_model.bin.index.json", "onnx/model.onnx", "onnx/config.json", "old.safetensors", "model-q4.gguf"]


def test_files_beside_the_weights_are_kept_and_stale_weights_left_out_with_a_warning(tmp_path: Path, case: Merge) -> None:
    base = tmp_path / "base"
    for name, content in {**SIDECARS, **dict.fromkeys(STALE, b"stale")}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)
    with pytest.warns(tg.TorchgraftWarning, match="not copied") as caught:
        out = case()
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in STALE)
    assert {name: (out / name).read_bytes() for name in SIDECARS} == SIDECARS
    assert not any((out / name).exists() for name in [*STALE, "onnx"])
    tg.unmerge_checkpoint(out, tmp_path / "back")
    assert tree(tmp_path / "back") == {name: digest for name, digest in tree(base).items() if name not in [*STALE, "onnx"]}


def test_a_cache_of_links_is_merged_into_plain_tree(tmp_path: Path, case: Merge) -> None:
    """The layout of the hub's cache: snapshots/<id>/<file> are links into blobs/."""
    snapshot = tmp_path / "hub" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "base").rename(tmp_path / "hub" / "blobs")
    for blob in (tmp_path / "hub" / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    out = case("hub/snapshots/1")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    tg.unmerge_checkpoint(out, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "hub" / "blobs")


def test_merging_and_unmerging_repeatedly_never_drifts(tmp_path: Path, case: Merge) -> None:
    original, source = tree(tmp_path / "base"), "base"
    merged = set()
    for turn in range(4):
        out, source = case(source, output=f"out{turn}"), f"back{turn}"
        merged.add(tuple(path.read_bytes() for path in sorted(out.glob("*.safetensors"))))
        tg.unmerge_checkpoint(out, tmp_path / source)
        assert tree(tmp_path / source) == original
    assert len(merged) == 1


def test_second_adapter_on_a_merged_model_is_unmerged_step_by_step(tmp_path: Path, case: Merge) -> None:
    write_adapter(tmp_path / "second", "llama", factors_of("llama", seed=700))
    case()
    case("out", "second", "both")
    tg.unmerge_checkpoint(tmp_path / "both", tmp_path / "one")
    assert tree(tmp_path / "one") == tree(tmp_path / "out")
    tg.unmerge_checkpoint(tmp_path / "one", tmp_path / "none")
    assert tree(tmp_path / "none") == tree(tmp_path / "base")


@pytest.mark.parametrize("chain", [["adapter"], ["adapter", "second"]])
@pytest.mark.parametrize("undo", [True, False])
def test_the_same_adapter_is_never_merged_twice(tmp_path: Path, case: Merge, chain: list[str], undo: bool) -> None:
    write_adapter(tmp_path / "second", "llama", factors_of("llama", seed=700))
    source = "base"
    for name in chain:
        source = case(source, name, f"with-{name}", undo=undo).name
    before = tree(tmp_path)
    with pytest.raises(MergeError, match="merged into it already"):
        case(source, "adapter")
    assert tree(tmp_path) == before


def test_merge_without_undo_cannot_be_unmerged(tmp_path: Path, case: Merge) -> None:
    out = case(undo=False)
    before = tree(tmp_path)
    assert "out/torchgraft_undo" not in before
    for source, reason in ((out, "--no-undo"), (tmp_path / "base", "not merged by torchgraft")):
        with pytest.raises(MergeError, match=reason):
            tg.unmerge_checkpoint(source, tmp_path / "back")
    assert tree(tmp_path) == before


def spoil(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x44
    path.write_bytes(data)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change_record(out: Path) -> None:
        record = json.loads((out / "torchgraft_merge.json").read_text())
        change(record)
        (out / "torchgraft_merge.json").write_text(json.dumps(record))

    return change_record


def change_tensor(path: Path, name: str) -> None:
    tensors = load_file(path)
    tensors[name].mul_(-2)
    save_file(tensors, path, {"format": "pt"})


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CORRECTIONS, ADAPTER = "torchgraft_undo/corrections.safetensors", "torchgraft_undo/adapters/0"
SITE = "model.layers.0.self_attn.q_proj"
TAMPER: dict[str, Callable[[Path], object]] = {
    "merged weight": lambda out: change_tensor(out / SECOND, f"{SITE}.weight"),
    "copied weight": lambda out: change_tensor(out / SECOND, "position_ids"),
    "header": lambda out: spoil(out / FIRST, 60),
    "sidecar": lambda out: (out / "tokenizer.json").write_text("{ }"),
    "sidecar is gone": lambda out: (out / "tokenizer.json").unlink(),
    "corrections": lambda out: spoil(out / CORRECTIONS),
    "corrections are gone": lambda out: (out / CORRECTIONS).unlink(),
    "adapter": lambda out: spoil(out / ADAPTER / "adapter_model.safetensors"),
    "record is no JSON": lambda out: (out / "torchgraft_merge.json").write_text("{"),
    "record's format": edit(lambda record: record.update(format=99)),
    "hash of a tensor": edit(lambda record: record["original_tensors"].update({f"{SITE}.weight": "0" * 64})),
    "hash of a file": edit(lambda record: record["original_files"].update({FIRST: "0" * 64})),
    "kept header": lambda out: spoil(out / f"torchgraft_undo/headers/{FIRST}.header"),
    "kept header is gone": lambda out: (out / f"torchgraft_undo/headers/{FIRST}.header").unlink(),
    "header not listed": edit(lambda record: record["headers"].pop(FIRST)),
    "tensor not listed": edit(lambda record: record["original_tensors"].pop(f"{SITE}.weight")),
    "site of another kind": edit(lambda record: record["sites"][SITE].update(kind="Conv1D")),
    "site without a kind": edit(lambda record: record["sites"].update({SITE: 3})),
    "file outside": edit(lambda record: record["original_files"].update({"../base/config.json": "0" * 64})),
}


@pytest.mark.parametrize("what", sorted(TAMPER))
def test_unmerge_refuses_what_was_changed_since(tmp_path: Path, case: Merge, what: str) -> None:
    TAMPER[what](case())
    before = tree(tmp_path)
    with pytest.raises(TorchgraftError):
        tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path) == before


FULL = OSError(errno.ENOSPC, "No space left on device")
PLACES = ["first tensor", "later tensor", "shutil.copyfile", "os.fsync", "pathlib.Path.rename"]


@pytest.mark.parametrize(("error", "expected"), [(FULL, FileFormatError), (KeyboardInterrupt(), KeyboardInterrupt)])
@pytest.mark.parametrize(("where", "output"), [*((where, "new") for where in PLACES), ("first tensor", "new/deep/er")])
def test_failure_leaves_nothing(tmp_path: Path, case: Merge, error: BaseException, expected: type, where: str, output: str) -> None:
    out, target = case(), tmp_path / output
    before = tree(tmp_path)
    for start in (
        partial(tg.merge_checkpoint, tmp_path / "base", tmp_path / "adapter", target),
        partial(tg.unmerge_checkpoint, out, target),
    ):
        failing = Mock(side_effect=chain([None] * (3 if where == "later tensor" else 0), repeat(error)))
        with pytest.MonkeyPatch.context() as patch:
            if "tensor" not in where:
                patch.setattr(where, failing)
            with pytest.raises(expected):
                start(progress=failing if "tensor" in where else Mock())
        assert tree(tmp_path) == before


def test_wrong_bytes_on_disk_are_noticed_by_the_verification(tmp_path: Path, case: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    before, right = tree(tmp_path), file_tensors.write_exactly
    monkeypatch.setattr(file_tensors, "write_exactly", lambda target, data, offset: right(target, memoryview(bytes(data)[::-1]), offset))
    with pytest.raises(MergeError, match="verification failed"):
        case()
    assert tree(tmp_path) == before
    case(verify=False)


@pytest.mark.parametrize(("dtype", "scale", "reason"), [(torch.float16, 300, "float16"), (torch.float32, float("nan"), "NaN")])
def test_merge_that_is_not_finite_is_refused(tmp_path: Path, dtype: torch.dtype, scale: float, reason: str) -> None:
    base = write_base(tmp_path / "base", "llama", dtype)
    factors = {name: pair for name, pair in factors_of("llama", scale=scale).items() if name.endswith("up_proj")}
    adapter = write_adapter(tmp_path / "adapter", "llama", factors)
    before = tree(tmp_path)
    with pytest.raises(TorchgraftError, match=f"up_proj.*{reason}"):
        tg.merge_checkpoint(base, adapter, tmp_path / "out")
    assert tree(tmp_path) == before
