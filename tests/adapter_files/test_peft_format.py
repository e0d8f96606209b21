"""PEFT's adapter format, both ways: PEFT itself is the reference for what a file of its format computes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

import models
import torchgraft as tg
from peft_reference import CLOSE, CONVOLUTIONS, FILES, GROUPED, WARNINGS_OF_PEFT, alone, build, image_for, peft_reads, peft_trains, run

pytestmark = WARNINGS_OF_PEFT

OURS = {
    "plain, all kinds": ("plain", {"targets": ["@all"], "rank": 4}),
    "plain, some layers": ("plain", {"targets": ["attn.*", "conv"], "rank": 5, "alpha": 2.5}),
    "llama": ("llama", {}),
    "llama, embeddings and head": ("llama", {"targets": ["@all"], "rank": 3}),
    "gpt2, Conv1D": ("gpt2", {"targets": ["*.{c_attn,c_proj,c_fc}"], "rank": 4}),
    "gpt2, tied embedding": ("gpt2", {"targets": ["wte", "wpe", "c_attn"]}),
    "bert, a new head": ("bert", {"targets": ["query", "value", "word_embeddings"], "also_train": ["classifier"]}),
    "t5": ("t5", {"targets": ["@linear", "lm_head"]}),
    "vit": ("vit", {"targets": ["@conv", "@attention"], "also_train": ["classifier"]}),
    "whisper, convolutions": ("whisper", {"targets": ["conv1", "conv2", "q_proj", "fc1"]}),
    "rank-stabilized": ("llama", {"scaling": "alpha/sqrt(r)", "rank": 5}),
    "no scaling": ("llama", {"scaling": "none", "rank": 5}),
    "fractional alpha": ("gpt2", {"alpha": 0.3, "rank": 3}),
    "own ranks and alphas": (
        "llama",
        {"overrides": {"*.layers.1.*.q_proj": {"rank": 2}, "v_proj": {"rank": 11, "alpha": 3.0}, "up_proj": {"alpha": 40.0}}},
    ),
    "own scalings": ("llama", {"scaling": "alpha/sqrt(r)", "overrides": {"q_proj": {"scaling": "none"}, "o_proj": {"scaling": "alpha/r"}}}),
    "pissa": ("llama", {"init": "pissa", "rank": 3, "scaling": "alpha/sqrt(r)", "overrides": {"v_proj": {"rank": 2}}}),
    "pissa on all kinds": ("plain", {"init": "pissa", "targets": ["@all"], "rank": 2}),
    "pissa beside another init": ("gpt2", {"init": "pissa", "rank": 4, "overrides": {"c_proj": {"init": "kaiming", "scaling": "none"}}}),
}


@pytest.mark.parametrize(("family", "options"), OURS.values(), ids=OURS)
def test_peft_computes_our_adapter(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(family)
    before = run(model, family)
    adapter = tg.apply(model, "lora", **options)
    models.perturb_(adapter.parameters())
    ours = run(model, family)
    adapter.save(tmp_path)
    assert (ours - before).abs().max() > 1e-2
    torch.testing.assert_close(run(peft_reads(build(family), tmp_path), family), ours, **CLOSE)


@pytest.mark.parametrize(("family", "options"), OURS.values(), ids=OURS)
def test_without_our_record_our_files_are_read_as_peft_reads_them(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    adapter = tg.apply(build(family), "lora", **options)
    models.perturb_(adapter.parameters())
    adapter.save(tmp_path)
    (tmp_path / "torchgraft.json").unlink()
    again = build(family)
    assert {site.name for site in tg.load(again, tmp_path).sites} == {site.name for site in adapter.sites}
    torch.testing.assert_close(run(again, family), run(peft_reads(build(family), tmp_path), family), **CLOSE)


PEFTS = {
    "plain, all kinds": ("plain", {"target_modules": ["embed", "conv", "q_proj", "out_proj", "0", "2", "head"]}),
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 3}),
    "gpt2, Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, position embedding": ("gpt2", {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}),
    "bert, a new head": ("bert", {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}),
    "bert, two whole modules": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}),
    "llama, whole embedding and head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi_0", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "t5, tied embedding": ("t5", {"target_modules": ["shared", "q"]}),
    "vit": ("vit", {"target_modules": ["projection", "q_proj", "fc1"], "modules_to_save": ["classifier"]}),
    "rank-stabilized": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "r": 5}),
    "orthogonal start": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 4}),
    "dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.5}),
    # These names are in PEFT's list of embeddings, whose frozen weights it saves beside the adapter.
    "llama, embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama, head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
}


@pytest.mark.parametrize(("family", "options"), PEFTS.values(), ids=PEFTS)
def test_we_compute_peft_s_adapter(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    trained = peft_trains(build(family), tmp_path, **options)
    model = build(family)
    before = run(model, family)
    adapter = tg.load(model, tmp_path)
    theirs = run(trained, family)
    assert (theirs - before).abs().max() > 1e-2
    torch.testing.assert_close(run(model, family), theirs, **CLOSE)
    adapted = {name.removeprefix("base_model.model.") for name, module in trained.named_modules() if hasattr(module, "base_layer")}
    assert {site.name for site in adapter.sites} == adapted
    assert adapter.count().trainable == sum(p.numel() for p in trained.parameters() if p.requires_grad)


def test_peft_s_whisper_convolutions_are_ours(tmp_path: Path) -> None:
    peft_trains(build("whisper"), tmp_path, target_modules=["conv1", "conv2", "fc2"])
    model = build("whisper")
    tg.load(model, tmp_path)
    torch.testing.assert_close(run(model, "whisper"), run(peft_reads(build("whisper"), tmp_path), "whisper"), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}], ids=["lora", "pissa"])
@pytest.mark.parametrize("layer", (CONVOLUTIONS | GROUPED).values(), ids=CONVOLUTIONS | GROUPED)
@torch.no_grad()
def test_peft_computes_our_convolution(layer: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path) -> None:
    model = alone(layer)
    x = image_for(model)
    adapter = tg.apply(model, "lora", ["layer"], rank=2, **options)
    models.perturb_(adapter.parameters())
    adapter.save(tmp_path)
    torch.testing.assert_close(peft_reads(alone(layer), tmp_path)(x), model(x), **CLOSE)
    assert (model(x) - alone(layer)(x)).abs().max() > 1e-2


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@torch.no_grad()
def test_we_compute_peft_s_convolution(layer: Callable[[], nn.Module], tmp_path: Path) -> None:
    trained, model = peft_trains(alone(layer), tmp_path, target_modules=["layer"], r=3, lora_alpha=5), alone(layer)
    tg.load(model, tmp_path)
    torch.testing.assert_close(model(image_for(model)), trained(image_for(model)), **CLOSE)


@pytest.mark.parametrize("record", [True, False], ids=["with our record", "as plain PEFT"])
@pytest.mark.parametrize("layer", GROUPED.values(), ids=GROUPED)
@torch.no_grad()
def test_a_grouped_convolution_is_block_diagonal_in_the_file_and_comes_back(
    layer: Callable[[], nn.Module], record: bool, tmp_path: Path
) -> None:
    model, again = alone(layer), alone(layer)
    adapter = tg.apply(model, "lora", ["layer"], rank=2)
    models.perturb_(adapter.parameters())
    adapter.save(tmp_path)
    a = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.layer.lora_A.weight"]
    groups, width = model.layer.groups, model.layer.weight.shape[1]
    assert a.shape[:2] == (2 * groups, width * groups)
    blocks = a.reshape(groups, 2, groups, width, *a.shape[2:])
    for row in range(groups):
        for column in range(groups):
            assert blocks[row, :, column].any() == (row == column)
    if not record:
        (tmp_path / "torchgraft.json").unlink()
    tg.load(again, tmp_path)
    torch.testing.assert_close(again(image_for(model)), model(image_for(model)), **CLOSE)


@pytest.mark.parametrize("layer", GROUPED.values(), ids=GROUPED)
def test_peft_s_grouped_convolution_across_groups_is_refused_with_the_reason(layer: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = alone(layer)
    peft_trains(alone(layer), tmp_path, target_modules=["layer"], r=2 * model.layer.groups)
    with pytest.raises(tg.PairingError, match=rf"layer: .*across the layer's {model.layer.groups} groups"):
        tg.load(model, tmp_path)
    assert tg.adapters(model) == {}


ROUND_TRIPS = {
    "llama": ("llama", torch.float32, {"rank": 3, "alpha": 0.7, "dropout": 0.25, "overrides": {"v_proj": {"rank": 5, "dropout": 0.0}}}),
    "all kinds": ("plain", torch.float32, {"targets": ["@all"], "scaling": "none", "rank": 4}),
    "pissa": ("gpt2", torch.float32, {"init": "pissa", "rank": 4, "overrides": {"c_fc": {"init": "kaiming", "alpha": 3.0}}}),
    "pissa in bfloat16": ("plain", torch.bfloat16, {"init": "pissa", "targets": ["@all"], "rank": 2, "dtype": "bfloat16"}),
    "bfloat16": ("bert", torch.bfloat16, {"dtype": "bfloat16", "also_train": ["classifier"], "scaling": "alpha/sqrt(r)"}),
    "bfloat16 on a float32 base": ("bert", torch.float32, {"dtype": "bfloat16", "also_train": ["pooler"]}),
}


@pytest.mark.parametrize(("family", "dtype", "options"), ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_what_we_save_we_load_bit_for_bit(family: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    adapter = tg.apply(build(family).to(dtype), "lora", **options)
    models.perturb_(adapter.parameters())
    adapter.save(tmp_path / "first")
    again = tg.load(build(family).to(dtype), tmp_path / "first", name="again")
    assert again.config == adapter.config
    assert {name: part.config for name, part in again.parts.items()} == {name: part.config for name, part in adapter.parts.items()}
    for name, part in adapter.parts.items():
        for key, tensor in part.tensors().items():
            torch.testing.assert_close(again.parts[name].tensors()[key], tensor, rtol=0, atol=0)
            assert isinstance(again.parts[name].tensors()[key], nn.Parameter) == isinstance(tensor, nn.Parameter)
    for (name, ours), (same, theirs) in zip(adapter.named_parameters(), again.named_parameters(), strict=True):
        assert name == same
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    again.save(tmp_path / "second")
    for file in FILES:
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def test_an_adapter_that_peft_saved_under_a_name_is_read_from_its_subfolder(tmp_path: Path) -> None:
    trained = peft_trains(build("llama"), tmp_path, adapter_name="french", target_modules=["q_proj"])
    model = build("llama")
    tg.load(model, tmp_path / "french", name="french")
    torch.testing.assert_close(run(model, "llama"), run(trained, "llama"), **CLOSE)


def test_peft_s_bin_files_are_read(tmp_path: Path) -> None:
    trained = peft_trains(build("bert"), tmp_path, safe=False, target_modules=["query"], task_type="SEQ_CLS")
    assert (tmp_path / "adapter_model.bin").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    model = build("bert")
    tg.load(model, tmp_path)
    torch.testing.assert_close(run(model, "bert"), run(trained, "bert"), **CLOSE)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def plain_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_a_malicious_bin_file_is_refused_and_not_executed(write: Callable[[object, Path], None], tmp_path: Path) -> None:
    peft_trains(build("llama"), tmp_path, safe=False, target_modules=["q_proj"])
    file, marker = tmp_path / "adapter_model.bin", tmp_path / "executed"
    write({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": Payload(marker)}, file)
    model = build("llama")
    with pytest.raises(tg.FileFormatError, match=r"adapter_model\.bin.*safetensors"):
        tg.load(model, tmp_path)
    assert not marker.exists()
    assert tg.adapters(model) == {}
    pickle.loads(file.read_bytes()) if write is plain_pickle else torch.load(file, weights_only=False)
    assert marker.exists()  # so the refusal was of something live


@pytest.mark.parametrize("content", [["no map"], {"lora_A": "no tensor"}], ids=["a list", "a string"])
def test_a_bin_file_of_something_else_is_refused(content: object, tmp_path: Path) -> None:
    peft_trains(build("llama"), tmp_path, safe=False, target_modules=["q_proj"])
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(tg.FileFormatError, match="a map from names to tensors"):
        tg.load(build("llama"), tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_base_peft_has_changed_is_refused(init: str, tmp_path: Path) -> None:
    """PEFT takes the initial B·A out of the base's weights, and does so again when it loads the file."""
    trained = peft_trains(build("llama"), tmp_path, target_modules=["q_proj"], r=4, init_lora_weights=init)
    torch.testing.assert_close(run(peft_reads(build("llama"), tmp_path), "llama"), run(trained, "llama"), rtol=1e-3, atol=1e-3)
    model = build("llama")
    with pytest.raises(tg.PairingError, match=f"init_lora_weights.*{init}"):
        tg.load(model, tmp_path)
    assert tg.adapters(model) == {}


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")  # said while it reads the start, to convert
def test_a_pissa_adapter_that_peft_has_converted_is_read(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 4, "init_lora_weights": "pissa"}
    trained = peft.get_peft_model(build("llama"), peft.LoraConfig(**options)).eval()
    trained.peft_config["default"].init_lora_weights = True  # what PEFT's documentation asks for before the first save
    trained.save_pretrained(tmp_path / "start")
    trained.peft_config["default"].init_lora_weights = "pissa"
    models.perturb_([parameter for parameter in trained.parameters() if parameter.requires_grad])
    theirs = run(trained, "llama")
    trained.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = build("llama")
    tg.load(model, tmp_path / "end")
    torch.testing.assert_close(run(model, "llama"), theirs, **CLOSE)


def test_distilbert_s_second_head_is_read(tmp_path: Path) -> None:
    """PEFT takes modules_to_save as ends of names, so that "classifier" is also the pre_classifier."""
    config = hf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=67, num_labels=3)

    def distilbert() -> nn.Module:
        torch.manual_seed(0)
        return hf.DistilBertForSequenceClassification(config).eval()

    trained, model = peft_trains(distilbert(), tmp_path, target_modules=["q_lin"], task_type="SEQ_CLS"), distilbert()
    tg.load(model, tmp_path)
    torch.testing.assert_close(run(model, "bert"), run(trained, "bert"), **CLOSE)
