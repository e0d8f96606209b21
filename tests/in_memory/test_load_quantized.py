"""tg.load_quantized: which layers are quantized, how, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchgraft as tg
from four_bit import EXACT, TOKENS, WAYS, by_hand, contents, error, logits, same
from models import GROUPED, SPECIAL, build, perturb_


def llama(directory: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    config = {**GROUPED, **SPECIAL, "hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False, **options}
    hf.LlamaForCausalLM(hf.LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(directory, max_shard_size="100KB")
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama"))


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_matched_layers_are_quantized_while_they_are_read(options: dict[str, Any], checkpoint: Path) -> None:
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    model = tg.load_quantized(checkpoint, ["*.{q,v}_proj", "down_proj"], layers="1", **options)
    found = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert found == {f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")}
    files = tensors(checkpoint)
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in found:
            assert same(contents(model.get_submodule(layer)), by_hand(files[name], **options))
        else:
            assert parameter.equal(files[name])
    assert model.dtype == torch.bfloat16


def test_by_default_every_matrix_but_the_head_is_quantized_and_the_model_runs(checkpoint: Path) -> None:
    model = tg.load_quantized(checkpoint, **EXACT)
    found = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(found) == 14
    assert type(model.lm_head) is nn.Linear
    reference = hf.AutoModelForCausalLM.from_pretrained(checkpoint).float()
    for name in found:
        reference.get_submodule(name).weight.data = by_hand(reference.get_submodule(name).weight.bfloat16())[-1].float()
    assert error(logits(model), logits(reference)) < 0.02
    assert model.generate(TOKENS, max_new_tokens=3, min_new_tokens=3).shape == (2, 7)
    adapter = tg.apply(model, "qlora", rank=2)
    assert {site.name for site in adapter.sites} == set(found)
    assert error(logits(model), logits(reference)) < 0.02


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = tg.load_quantized(llama(tmp_path, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert logits(model).isfinite().all()


def test_what_we_load_is_saved_and_loaded_by_plain_transformers(checkpoint: Path, tmp_path: Path) -> None:
    model = tg.load_quantized(checkpoint, ["q_proj", "down_proj"])
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).train()  # in eval, CPUs with AVX512-BF16 round once more
    quantized = [[name for name, m in each.named_modules() if isinstance(m, bnb.nn.Linear4bit)] for each in (model, again)]
    assert len(quantized[0]) == 4
    assert quantized[0] == quantized[1]
    assert logits(again).equal(logits(model))


def test_adapters_know_the_checkpoint_that_a_quantized_model_came_from(checkpoint: Path, tmp_path: Path) -> None:
    model = tg.load_quantized(checkpoint)
    adapter = tg.apply(model, "qlora", ["q_proj"], rank=2)
    perturb_(adapter.parameters())
    adapter.save(tmp_path / "adapter")
    want = logits(model)
    for again in (hf.AutoModelForCausalLM.from_pretrained(checkpoint), tg.load_quantized(checkpoint, ["q_proj"])):
        tg.load(again, tmp_path / "adapter")
        assert isinstance(again.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)
    again = tg.load_quantized(checkpoint)
    tg.load(again, tmp_path / "adapter")
    assert logits(again).equal(want)
    other = llama(tmp_path / "other", initializer_range=0.03)
    with pytest.raises(tg.PairingError, match=r"q_proj: "):
        tg.load(tg.load_quantized(other), tmp_path / "adapter")


def write(model: nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("targets", [["query"], None], ids=["targets that are there", "a target that is not there"])
def test_a_classifier_whose_head_and_pooler_the_checkpoint_lacks(targets: list[str] | None, tmp_path: Path) -> None:
    """By default the pooler is selected, too; it has no weight in the files."""
    model = tg.load_quantized(write(build("bert_lm"), tmp_path), targets, model_class=hf.AutoModelForSequenceClassification, num_labels=3)
    assert type(model.classifier) is nn.Linear
    query = model.bert.encoder.layer[0].attention.self.query
    assert same(contents(query), by_hand(build("bert_lm").bert.encoder.layer[0].attention.self.query.weight))
    assert logits(model).shape == (2, 3)
    adapter = tg.apply(model, "qlora", ["query"], also_train=["classifier"], rank=2)
    model(TOKENS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def tensors_alone(directory: Path) -> Path:
    save_file({"a.weight": torch.ones(4, 4)}, directory / "model.safetensors")
    return directory


NOT_LOADED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], type[Exception], str]] = {
    "a pattern that matches nothing": (llama, {"targets": ["q_porj"]}, tg.SelectionError, "'q_porj' matches no layer; near names: q_proj"),
    "one of two patterns": (llama, {"targets": ["q_proj", "wq"]}, tg.SelectionError, "'wq' matches no layer"),
    "Conv1D": (
        lambda path: write(build("gpt2"), path),
        {},
        tg.AttachError,
        r"^transformer\.h\.0\.attn\.c_attn: only a Linear can be quantized, and its kind is Conv1D",
    ),
    "an embedding": (
        llama,
        {"targets": "embed_tokens"},
        tg.AttachError,
        "embed_tokens: only a Linear can be quantized, and its kind is Embedding",
    ),
    "a tied head": (
        lambda path: llama(path, tie_word_embeddings=True),
        {"targets": ["q_proj", "lm_head"]},
        tg.AttachError,
        "lm_head: .*embed_tokens",
    ),
    "float64": (lambda path: write(build("llama").double(), path), {}, tg.AttachError, "float64"),
    "no such directory": (lambda path: path / "nowhere", {}, tg.FileFormatError, "nowhere: no such"),
    "an empty directory": (lambda path: path, {}, tg.FileFormatError, "config.json"),
    "no transformers checkpoint": (tensors_alone, {}, tg.FileFormatError, "config.json"),
    "quantized already": (lambda path: write(tg.load_quantized(llama(path / "base")), path / "4bit"), {}, tg.TorchgraftError, "quantiz"),
    "an unknown type": (llama, {"quant_type": "nf8"}, tg.ConfigError, "nf8"),
    "an unknown block size": (llama, {"block_size": 100}, tg.ConfigError, "100"),
    "an unknown compute type": (llama, {"compute_dtype": "bf16"}, tg.ConfigError, "bf16"),
}


@pytest.mark.parametrize(("make", "options", "kind", "message"), NOT_LOADED.values(), ids=NOT_LOADED)
def test_what_cannot_be_loaded_in_4_bits_is_refused(
    make: Callable[[Path], Path], options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        tg.load_quantized(make(tmp_path), **options)


WATCHED = """
import sys, threading, time
from pathlib import Path
import bitsandbytes
import torchgraft as tg

def anonymous():
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) * 1024

def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.002)

tg.load_quantized(sys.argv[1])  # what is imported and built only once
before = peak = anonymous()
stop = False
thread = threading.Thread(target=watch)
thread.start()
model = tg.load_quantized(sys.argv[2])
stop = True
thread.join()
assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()) == 112
print(peak - before)
"""


@pytest.fixture
def large() -> Iterator[Path]:
    """406 MB in bfloat16, in memory."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        sizes = {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        }
        with torch.device("meta"):
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, **SPECIAL, **sizes})).to(torch.bfloat16)
        model.to_empty(device="cpu").apply(lambda module: [p.data.fill_(0.01) for p in module.parameters(recurse=False)])
        model.save_pretrained(directory, max_shard_size="60MB")
        yield Path(directory)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir() or not Path("/proc/self/status").is_file(), reason="it reads Linux's own account")
def test_the_16_bit_weights_are_never_in_memory_together(large: Path, checkpoint: Path) -> None:
    whole = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert whole > 400e6
    command = [sys.executable, "-c", WATCHED, str(checkpoint), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    assert 0.2 * whole < grown < 0.5 * whole, f"{grown / 1e6:.0f} MB for {whole / 1e6:.0f} MB in 16 bits"
