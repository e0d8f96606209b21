"""What the headers of a checkpoint tell of its layers, against the modules that transformers builds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import models
import torchgraft as tg
from torchgraft.checkpoint.reading import open_checkpoint
from torchgraft.layers.layer import Layer, by_name
from torchgraft.layers.of_checkpoint import layers_of_checkpoint
from torchgraft.layers.of_module import layers_of_module

TOKENS = models.SPECIAL
SEQ2SEQ = {
    key: value for key, value in models.WHISPER.items() if key not in ("num_mel_bins", "max_source_positions", "max_target_positions")
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "llama tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**models.GROUPED, **TOKENS, tie_word_embeddings=True)),
    "gpt2 untied": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=67, n_positions=24, tie_word_embeddings=False, **TOKENS)
    ),
    "bert_lm untied": lambda: hf.BertForMaskedLM(hf.BertConfig(**models.TEXT, pad_token_id=0, tie_word_embeddings=False)),
    "t5 encoder": lambda: hf.T5EncoderModel(hf.T5Config(d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=48, vocab_size=67)),
    "xlm_roberta": lambda: hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**models.TEXT, **TOKENS)),
    "rembert": lambda: hf.RemBertForMaskedLM(hf.RemBertConfig(**models.TEXT, **TOKENS, input_embedding_size=16, output_embedding_size=24)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**models.TEXT, **TOKENS, cls_token_id=1, sep_token_id=2)),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**SEQ2SEQ)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**models.GROUPED, head_dim=8, **TOKENS)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=67, **TOKENS)),
}

VIT = {
    ".encoder.layer.": ".layers.",
    ".attention.attention.query": ".attention.q_proj",
    ".attention.attention.key": ".attention.k_proj",
    ".attention.attention.value": ".attention.v_proj",
    ".attention.output.dense": ".attention.o_proj",
    ".intermediate.dense": ".mlp.fc1",
    ".output.dense": ".mlp.fc2",
}
RENAMED = {"gpt_neox": {"embed_out": "lm_head"}, "vit": VIT}
"""Where transformers 5 writes other names than its modules have: on disk → in memory, one after another."""

DOUBTFUL = {"whisper": {"model.encoder.embed_positions"}}
"""Layers to which the files need not give the kind that they have."""


@cache
def module(family: str) -> nn.Module:
    torch.manual_seed(0)
    return (models.FAMILIES | OTHERS)[family]().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def get(family: str) -> Path:
        root = tmp_path_factory.mktemp(family.replace(" ", "_"))
        module(family).save_pretrained(root)
        return root

    return get


def layers_in(path: Path, kinds: dict[str, str] | None = None) -> dict[str, Layer]:
    return {layer.name: layer for layer in layers_of_checkpoint(open_checkpoint(path), kinds)}


def layers_in_memory(family: str) -> dict[str, Layer]:
    return by_name(layers_of_module(module(family), tg.registry().kinds()))


def write(path: Path, **tensors: torch.Tensor) -> Path:
    """A file without a config.json beside it; in the names, __ stands for a dot."""
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return path


def name_in_memory(family: str, name: str) -> str:
    for old, new in RENAMED.get(family, {}).items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_layer_has_the_kind_of_its_module(saved, family):
    on_disk, in_memory = layers_in(saved(family)), layers_in_memory(family)
    for name, layer in on_disk.items():
        real = in_memory[name_in_memory(family, name)]
        assert (layer.shape, layer.dtype) == (real.shape, real.dtype), name
        if name in DOUBTFUL.get(family, ()) and layer.kind is None:
            assert layer.reason, name
        else:
            assert (layer.kind, layer.role) == (real.kind, real.role), name
    written = {name_in_memory(family, name) for name in on_disk}
    assert all(layer.tied or name != layer.name for name, layer in in_memory.items() if name not in written)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_matrix_without_a_kind_has_a_reason_and_nothing_else_has(saved, family):
    matrices = {name for name, tensor in open_checkpoint(saved(family)).tensors.items() if len(tensor.shape) > 1}
    for name, layer in layers_in(saved(family)).items():
        assert bool(layer.reason) == (layer.kind is None and f"{name}.weight" in matrices), name


@pytest.mark.parametrize("family", OTHERS)
def test_a_given_kind_is_never_wrong(saved, family):
    in_memory = layers_in_memory(family)
    kinds = {name: (layer.kind, in_memory[name].kind) for name, layer in layers_in(saved(family)).items() if name in in_memory}
    assert len(kinds) > 5
    assert {name: pair for name, pair in kinds.items() if pair[0] not in (None, pair[1])} == {}


@pytest.mark.parametrize("family", models.FAMILIES | OTHERS)
def test_the_input_embedding_is_marked_where_the_head_shares_its_weight(saved, family):
    model = module(family)
    head, on_disk = model.get_output_embeddings(), layers_in(saved(family))
    embeddings = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Embedding) and name in on_disk}
    tied = {name for name, layer in embeddings.items() if head is not None and layer.weight is head.weight}
    assert {name for name, layer in on_disk.items() if layer.tied} - {"lm_head"} == tied


@pytest.mark.parametrize("family", ["gpt2", "llama tied"])
def test_a_tied_head_is_a_layer_though_the_files_have_none(saved, family):
    on_disk, in_memory = layers_in(saved(family)), layers_in_memory(family)
    head, known = on_disk["lm_head"], in_memory["lm_head"]
    assert (head.kind, head.shape, head.dtype, head.tied) == (known.kind, known.shape, known.dtype, known.tied)
    assert (head.params, head.weight_name) == (0, f"{head.tied[0]}.weight")
    assert on_disk[head.tied[0]].tied == ("lm_head",)
    assert [site.name for site in tg.plan(saved(family), "@head").sites] == ["lm_head"]
    assert "lm_head" not in {site.name for site in tg.plan(saved(family)).sites}


@pytest.mark.parametrize(("family", "marked"), [("gpt2", ["transformer.wte", "lm_head"]), ("gpt2 untied", []), ("llama", []), ("bert", [])])
def test_a_config_that_does_not_speak_of_ties_leaves_it_to_the_head_in_the_file(saved, tmp_path, family, marked):
    shutil.copytree(saved(family), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [name for name, layer in layers_in(tmp_path).items() if layer.tied] == marked


def test_models_of_both_sorts_were_compared():
    heads = {family: module(family).get_output_embeddings() for family in models.FAMILIES | OTHERS}
    tied = {family for family, head in heads.items() if head is not None and head.weight is module(family).get_input_embeddings().weight}
    assert tied >= {"gpt2", "bert_lm", "t5", "whisper", "llama tied"}
    assert not tied & {"llama", "qwen2", "mistral", "gpt_neox", "gpt2 untied", "bert_lm untied", "xlm_roberta", "rembert"}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_parameters_and_bytes_add_up_to_the_file(saved, family):
    layers = layers_in(saved(family)).values()
    with safe_open(saved(family) / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  # it is no dict and cannot be iterated
    assert sum(layer.params for layer in layers) == sum(tensor.numel() for tensor in tensors)
    assert sum(layer.bytes for layer in layers) == sum(tensor.nbytes for tensor in tensors)
    assert tg.plan(saved(family)).total_params == sum(parameter.numel() for parameter in module(family).parameters())


@pytest.mark.parametrize("family", ["gpt2", "whisper"])
def test_shards_have_the_layers_of_the_whole_file(saved, family, tmp_path):
    module(family).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert layers_in(tmp_path) == layers_in(saved(family))


def test_the_headers_are_read_without_torch(saved):
    code = (
        "import sys; from torchgraft.checkpoint.reading import open_checkpoint; "
        "from torchgraft.layers.of_checkpoint import layers_of_checkpoint; "
        "print(len(layers_of_checkpoint(open_checkpoint(sys.argv[1]))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, saved("t5")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(layers_in(saved("t5")))), "False"]


# GPT-2's Conv1D, whose square weights look like a Linear's


def test_config_json_tells_square_conv1d(saved):
    on_disk = layers_in(saved("gpt2"))
    square = [layer for layer in on_disk.values() if layer.name.endswith("attn.c_proj")]
    assert [(layer.shape, layer.kind) for layer in square] == [((32, 32), "Conv1D")] * 2
    assert layers_in(saved("gpt2") / "model.safetensors") == on_disk


def test_without_config_json_a_square_weight_has_no_kind(saved, tmp_path):
    file = shutil.copy(saved("gpt2") / "model.safetensors", tmp_path)
    on_disk, in_memory = layers_in(file), layers_in_memory("gpt2")
    for name, layer in on_disk.items():
        if name.endswith("attn.c_proj"):
            assert layer.kind is None, name
            assert f"pass --kind '{name}=" in layer.reason
        else:
            assert layer.kind == in_memory[name].kind, name
    with pytest.raises(tg.SelectionError, match=r"attn\.c_proj .*pass --kind"):
        tg.plan(file, "attn.c_proj")


@pytest.mark.parametrize("pattern", ["*.attn.c_proj", "attn.c_proj", "transformer.h.{0,1}.attn.c_proj", r"re:.*\.attn\.c_proj"])
def test_a_kind_that_is_passed_resolves_it(saved, tmp_path, pattern):
    file = shutil.copy(saved("gpt2") / "model.safetensors", tmp_path)
    resolved = layers_in(file, {pattern: "Conv1D"})
    known = {name: layer.kind for name, layer in layers_in(saved("gpt2")).items() if not layer.weight_of}
    assert {name: layer.kind for name, layer in resolved.items()} == known
    assert not any(layer.reason for layer in resolved.values())
    sites = tg.plan(file, "attn.c_proj", kinds={pattern: "Conv1D"}).sites
    assert [(site.kind, site.name) for site in sites] == [("Conv1D", f"transformer.h.{block}.attn.c_proj") for block in (0, 1)]


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ({"*.attn.c_porj": "Conv1D"}, "c_porj"),
        ({"*.attn.c_proj": "Conv1d"}, "Conv1d"),
        ({"*.attn.c_proj": "Linaer"}, "Linaer"),
        ({"*.attn.c_proj": "Conv2d"}, "Conv2d"),
        ({"@attention": "Conv1D"}, "@attention"),
    ],
)
def test_a_passed_kind_that_cannot_be_is_refused(saved, kinds, says):
    with pytest.raises(tg.TorchgraftError, match=says):
        tg.plan(saved("gpt2"), "c_attn", kinds=kinds)


# Single layers, in a file without config.json

ALONE = [
    # layer, shape, the bias's length, the kinds that it may be given
    ("h.0.c_fc", (3, 5), 5, {"Conv1D"}),
    ("h.0.c_fc", (5, 3), 5, {"Linear"}),
    ("h.0.attn.c_attn", (4, 12), 12, {"Conv1D"}),
    ("h.0.c_proj", (5, 3), None, {None}),
    ("h.0.c_proj", (4, 4), 4, {None}),
    ("h.0.c_proj", (5, 3), 7, {None}),
    ("strange", (5, 3), 5, {"Linear"}),
    ("strange", (5, 3), 3, {None, "Conv1D"}),
    ("strange", (5, 3), None, {None}),
    ("strange", (4, 4), 4, {None}),
    ("strange", (2, 4, 4), None, {None}),
    ("attn.q_proj", (5, 3), None, {"Linear"}),
    ("attn.q_proj", (4, 4), 4, {"Linear"}),
    ("attn.q_proj", (5, 3), 3, {None, "Conv1D"}),
    ("wte", (9, 4), None, {"Embedding"}),
    ("conv", (8, 4, 3), 8, {"Conv1d"}),
    ("conv1", (8, 4, 3, 3), 8, {"Conv2d"}),
    ("conv", (8, 4, 3, 3, 3), None, {"Conv3d"}),
    ("conv", (8, 4, 3), 4, {None}),
    ("conv2", (8, 4, 3, 3), 4, {None}),
    ("conv", (8, 4, 1, 1, 1, 1), 8, {None}),
    ("patch_embed.proj", (8, 3, 4, 4), 8, {"Conv2d"}),
    ("upsample", (8, 4, 2, 2), 4, {None}),
    ("decoder.up.0", (8, 4, 2, 2), None, {None}),
    ("conv_transpose", (8, 4, 2), 4, {None}),
    ("upscale.proj", (8, 4, 2, 2), 8, {None}),
    ("mlp.experts.0.w1", (5, 3), None, {None}),
    ("mlp.gate", (2, 4), None, {None}),
]


@pytest.mark.parametrize(("name", "shape", "bias", "kinds"), ALONE)
def test_what_names_and_shapes_tell_alone(tmp_path, name, shape, bias, kinds):
    tensors = {f"{name}.weight": torch.zeros(shape)} | ({f"{name}.bias": torch.zeros(bias)} if bias else {})
    layer = layers_in(write(tmp_path / "model.safetensors", **tensors))[name]
    assert layer.kind in kinds
    assert (layer.kind is None) == bool(layer.reason)
    assert layer.params == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_weights_have_a_kind(tmp_path, dtype):
    layer = layers_in(write(tmp_path / "model.safetensors", q_proj__weight=torch.zeros(6, 4, dtype=dtype)))["q_proj"]
    assert (layer.kind, layer.dtype, layer.bytes) == ("Linear", str(dtype).removeprefix("torch."), 24 * dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantized_weights_have_no_kind(tmp_path, dtype):
    weight = torch.zeros(6, 4).to(dtype)
    file = write(
        tmp_path / "model.safetensors", q_proj__weight=weight, wte__weight=weight.clone(), conv__weight=weight.reshape(6, 2, 2).clone()
    )
    for layer in layers_in(file).values():
        assert layer.kind is None
        assert str(dtype).removeprefix("torch.") in layer.reason
        assert "quantized" in layer.reason
    with pytest.raises(tg.TorchgraftError, match="quantized"):
        tg.plan(file, "q_proj", kinds={"q_proj": "Linear"})
