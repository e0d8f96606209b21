"""What a merge only copies: tensors of quantized layers, types that torch lacks, and tensors that the index takes from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import torchgraft as tg
from references import all_tensors, bits, tree
from small_checkpoint import Small, make_adapter, write_model
from torchgraft import dtypes
from torchgraft.checkpoint.header import dump_header, read_header

# Storage format → the tensors of the quantized layer `k_proj`, by the rest of their names.
FORMATS: dict[str, dict[str, Tensor]] = {
    "bitsandbytes NF4": {
        "weight": torch.randint(0, 255, (32, 1)).byte(),
        "weight.absmax": torch.randint(0, 255, (2,)).byte(),
        "weight.quant_map": torch.rand(16),
        "weight.nested_absmax": torch.rand(1),
        "weight.nested_quant_map": torch.rand(256),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(90).byte(),
        "bias": torch.rand(8),
    },
    "LLM.int8()": {"weight": torch.ones(8, 8).char(), "SCB": torch.rand(8), "weight_format": torch.tensor(0).byte()},
    "GPTQ": {
        "qweight": torch.ones(1, 8).int(),
        "qzeros": torch.ones(1, 1).int(),
        "scales": torch.rand(1, 8).half(),
        "g_idx": torch.ones(8).int(),
    },
    "FP8 with a scale": {
        "weight": torch.rand(8, 8).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(1, 1),
        "input_scale": torch.rand(1),
    },
    "NVFP4": {
        "weight": torch.ones(8, 4).byte(),
        "weight_scale": torch.ones(8).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(4e-7),
    },
    "compressed-tensors": {"weight_packed": torch.ones(8, 1).int(), "weight_scale": torch.rand(8, 1), "weight_shape": torch.tensor([8, 8])},
    "MXFP4 experts": {
        "gate_up_proj_blocks": torch.ones(2, 8).byte(),
        "gate_up_proj_scales": torch.ones(2).byte(),
        "gate_up_proj_bias": torch.rand(2, 8),
    },
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("format_", FORMATS)
def test_what_belongs_to_a_quantized_layer_keeps_its_bytes_under_another_dtype(format_: str, dtype: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", Small())
    packed = {f"k_proj.{rest}": tensor for rest, tensor in FORMATS[format_].items()}
    cache_scale = {"attn.k_scale": torch.tensor(3e-7)}
    save_file(load_file(base / "model.safetensors") | packed | cache_scale, base / "model.safetensors", {"format": "pt"})
    tg.merge_checkpoint(base, make_adapter(tmp_path / "adapter"), tmp_path / "out", dtype=dtype)
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    for name in packed | cache_scale:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(bits(after[name]), bits(before[name]))
    for name in ("q_proj.weight", "embed_tokens.weight", "head.bias"):
        assert dtypes.name_of(after[name].dtype) == dtype
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(base)


def test_counters_and_masks_make_no_layer_a_quantized_one(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", Small())
    norm = {
        "norm.weight": torch.rand(8),
        "norm.num_batches_tracked": torch.tensor(7),
        "norm.mask": torch.tensor([True]),
        "A_log": torch.rand(2),
    }
    save_file(load_file(base / "model.safetensors") | norm, base / "model.safetensors", {"format": "pt"})
    tg.merge_checkpoint(base, make_adapter(tmp_path / "adapter"), tmp_path / "out", dtype="float16")
    after = all_tensors(tmp_path / "out")
    assert {name: after[name].dtype for name in norm} == {
        "norm.weight": torch.float16,
        "norm.num_batches_tracked": torch.int64,
        "norm.mask": torch.bool,
        "A_log": torch.float16,
    }


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "C64"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 1000}, {"dtype": "float32"}], ids=str)
def test_a_type_of_the_format_that_needs_no_meaning_is_copied(code: str, options: dict[str, object], tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", Small())
    old, dtype = read_header(base / "model.safetensors"), dtypes.NAMES[code]
    raw, noise = (base / "model.safetensors").read_bytes(), bytes(range(dtypes.nbytes(dtype, (8, 8)) % 256)) * 9
    entries = {entry.name: (entry.dtype, entry.shape) for entry in old.in_file_order} | {"experts.blocks": (dtype, (8, 8))}
    content = noise[: dtypes.nbytes(dtype, (8, 8))].ljust(dtypes.nbytes(dtype, (8, 8)), b"\x5a")
    (base / "model.safetensors").write_bytes(dump_header(entries, {"format": "pt"}) + raw[len(old.raw) :] + content)
    report = tg.merge_checkpoint(base, make_adapter(tmp_path / "adapter"), tmp_path / "out", **options)  # type: ignore[arg-type]
    assert report.verified
    file = next(path for path in (tmp_path / "out").glob("*.safetensors") if "experts.blocks" in read_header(path).tensors)
    entry = read_header(file).tensors["experts.blocks"]
    assert (entry.dtype, entry.shape) == (dtype, (8, 8))
    assert file.read_bytes()[entry.begin : entry.end] == content
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(base)


def overlaid(folder: Path, stem: str = "model") -> tuple[Path, dict[str, Tensor]]:
    """Write two shards: both have up_proj, of which the index takes the second, and one has a tensor that the index does not list."""
    base, tensors = write_model(folder, Small()), Small().state_dict()
    (base / "model.safetensors").unlink()
    stale = {"up_proj.weight": torch.zeros(24, 8, dtype=torch.bfloat16), "unlisted": torch.ones(3)}
    first = {name: tensor for name, tensor in tensors.items() if name in ("q_proj.weight", "embed_tokens.weight")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in first}
    save_file(first | stale, base / "a.safetensors")
    save_file(rest, base / "b.safetensors")
    weight_map = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")
    (base / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return base, tensors


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_the_index_decides_which_shard_a_tensor_is_taken_from(stem: str, tmp_path: Path) -> None:
    base, tensors = overlaid(tmp_path / "base", stem)
    adapter = make_adapter(tmp_path / "adapter")
    tg.merge_checkpoint(base, adapter, tmp_path / "out")
    tg.merge_checkpoint(write_model(tmp_path / "plain", Small()), adapter, tmp_path / "reference")
    stale, merged = load_file(tmp_path / "out/a.safetensors"), load_file(tmp_path / "out/b.safetensors")
    reference = all_tensors(tmp_path / "reference")
    assert torch.equal(merged["up_proj.weight"], reference["up_proj.weight"])
    assert not torch.equal(merged["up_proj.weight"], tensors["up_proj.weight"])
    assert not stale["up_proj.weight"].any()
    assert torch.equal(stale["unlisted"], torch.ones(3))
    assert torch.equal(stale["q_proj.weight"], reference["q_proj.weight"])
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(base)
    plan = tg.plan(base, targets=["@all"])
    assert sorted(layer.name for layer in plan.layers) == ["", "down_proj", "embed_tokens", "head", "q_proj", "up_proj"]


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"max_shard_size": 900}], ids=str)
def test_a_tensor_in_two_shards_is_not_rewritten(options: dict[str, object], tmp_path: Path) -> None:
    base, _ = overlaid(tmp_path / "base")
    with pytest.raises(tg.FileFormatError, match=r"in two shards.*save it again"):
        tg.merge_checkpoint(base, make_adapter(tmp_path / "adapter"), tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_shards_of_diffusers_keep_their_names(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", Small(), shards=2)
    for path in base.glob("model*"):
        path.rename(base / path.name.replace("model", "diffusion_pytorch_model", 1))
    index = base / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"diffusion_pytorch_model-'))
    tg.merge_checkpoint(base, make_adapter(tmp_path / "adapter"), tmp_path / "out", dtype="float32", max_shard_size=1000)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*"))
    assert names[-1] == index.name
    assert names[0].startswith("diffusion_pytorch_model-00001-of-")
    assert set(json.loads((tmp_path / "out" / index.name).read_text())["weight_map"].values()) == set(names[:-1])
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(base)
