"""QLoRA: quantising in place, loading in 4 bits, training, files, and PEFT on the same 4-bit weights."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchgraft as tg
from models import GROUPED, SPECIAL, Plain, build, perturb_

SITES = ["attn.q_proj", "mlp.0"]
TOKENS = torch.arange(8).reshape(2, 4)
EXACT = {"compute_dtype": "float32"}
WAYS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "one scale for each block": {"double_quant": False},
    "blocks of 256": {"block_size": 256},
}


def plain(seed: int = 0) -> Plain:
    torch.manual_seed(seed)
    return Plain().eval()


def by_hand(weight: Tensor, quant_type: str = "nf4", double_quant: bool = True, block_size: int = 64) -> list[Tensor]:
    """Codes and scales as bitsandbytes' own function makes them, and the weight that they stand for."""
    packed, state = bnb.functional.quantize_4bit(
        weight.detach().clone(), blocksize=block_size, compress_statistics=double_quant, quant_type=quant_type
    )
    return [packed, *numbers(state), bnb.functional.dequantize_4bit(packed, state)]


def numbers(state: Any) -> list[Tensor]:
    return [state.absmax, *([state.offset, state.state2.absmax] if state.nested else [])]


def contents(layer: nn.Module) -> list[Tensor]:
    weight = layer.weight
    return [weight.data, *numbers(weight.quant_state), bnb.functional.dequantize_4bit(weight.data, weight.quant_state)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a.dtype == b.dtype and a.equal(b) for a, b in zip(one, other, strict=True))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_the_selected_layers_and_no_others_are_quantised_in_place(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = plain().to(dtype)
    modules, types, parameters = dict(model.named_modules()), {m: type(m) for m in model.modules()}, dict(model.named_parameters())
    want = {name: by_hand(model.get_submodule(name).weight, **options) for name in SITES}
    old = [weakref.ref(parameters.pop(f"{name}.weight")) for name in SITES]
    adapter = tg.apply(model, "qlora", SITES, rank=2, **options)
    gc.collect()
    assert [weight() for weight in old] == [None, None], "the weights in 16 bits must be freed"
    for attached in (True, False):
        for name, module in modules.items():
            assert model.get_submodule(name) is module
            assert isinstance(module, bnb.nn.Linear4bit if name in SITES else types[module])
        assert all(same(contents(modules[name]), want[name]) for name in SITES)
        now = dict(model.named_parameters())
        assert all(now[name] is parameter for name, parameter in parameters.items())
        if attached:
            adapter.detach()
    assert {type(modules[name]) for name in SITES} == {bnb.nn.Linear4bit}
    assert all(parameter.requires_grad for parameter in parameters.values())


def changed(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = plain()
        change(model)
        return model

    return make


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "float64": (changed(lambda model: model.head.double()), ["mlp.0", "head"], r"^head: .*float64.*convert"),
    "no values": (changed(lambda model: model.to("meta")), ["mlp.0"], r"^mlp\.0: .*meta device.*tg\.load_quantized"),
    "tied": (
        changed(lambda model: setattr(model.attn["out_proj"], "weight", model.attn["q_proj"].weight)),
        ["mlp.0", "out_proj"],
        r"^attn\.out_proj: its weight is also that of attn\.q_proj",
    ),
    "an adapter is on it": (
        changed(lambda model: tg.apply(model, "lora", ["head"], name="other", rank=2)),
        ["mlp.0", "head"],
        r"^head: other adapters .*detach",
    ),
    "a convolution": (plain, ["mlp.0", "conv"], r"^conv: qlora does not work on Conv1d layers, only on Linear"),
    "an embedding": (plain, ["mlp.0", "embed"], r"^embed: qlora does not work on Embedding layers, only on Linear"),
}


@pytest.mark.parametrize(("make", "targets", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_quantised_is_refused_and_every_layer_stays(make: Callable[[], nn.Module], targets: list[str], message: str) -> None:
    model = make()
    types, parameters = [type(m) for m in model.modules()], dict(model.named_parameters())
    trained, attached = [p.requires_grad for p in parameters.values()], set(tg.adapters(model))
    with pytest.raises(tg.AttachError, match=message):
        tg.apply(model, "qlora", targets, rank=2)
    assert [type(m) for m in model.modules()] == types
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert [p.requires_grad for p in parameters.values()] == trained
    assert set(tg.adapters(model)) == attached


@pytest.mark.parametrize("value", ["nf8", "int8"])
def test_an_unknown_type_is_refused(value: str) -> None:
    with pytest.raises(tg.ConfigError, match="qlora: quant_type"):
        tg.apply(plain(), "qlora", SITES, quant_type=value)


def test_layers_that_are_quantised_already_are_left_as_they_are() -> None:
    four = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="fp4", compress_statistics=False)
    model = nn.Sequential(four, bnb.nn.Linear8bitLt(32, 32, has_fp16_weights=False), nn.Linear(32, 8)).to("cpu")
    weights = [model[0].weight, model[1].weight]
    adapter = tg.apply(model, "qlora", rank=2)
    assert [site.kind.name for site in adapter.sites] == ["Linear4bit", "Linear8bitLt", "Linear4bit"]
    assert [model[0].weight, model[1].weight] == weights
    assert [site.quantization["type"] for site in adapter.sites] == ["fp4", "int8", "nf4"]
    second = tg.apply(model, "qlora", name="second", rank=2)
    assert [model[0].weight, model[1].weight] == weights
    assert len(second.sites) == 3


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_that_of_the_dequantised_weight_and_the_factors(dtype: torch.dtype, own: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 20)).to(dtype), torch.randn(5, 48).to(dtype)
    weight, bias = by_hand(model[0].weight)[-1].double(), model[0].bias.detach().double()
    compute = "float32" if dtype == torch.float32 else "bfloat16"
    adapter = tg.apply(model, "qlora", ["0"], rank=4, alpha=6.0, dtype=str(own), compute_dtype=compute)
    perturb_(adapter.parameters(), 0.1)
    a, b = (adapter.parts["0"].tensors()[name] for name in "AB")
    assert (a.dtype, b.dtype, model(x).dtype) == (own, own, dtype)
    want = x.double() @ (weight + 1.5 * b.detach().double() @ a.detach().double()).T + bias
    assert error(model(x), want) < (1e-6 if dtype == own == torch.float32 else 0.01)


@pytest.mark.parametrize("name", ["adamw", "adamw_32bit", "adamw_8bit", "adam_8bit", "lion_32bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss_and_leaves_the_base(dtype: str, name: str) -> None:
    model = plain()
    adapter = tg.apply(model, "qlora", ["attn.*", "mlp.*", "head"], rank=4, dtype=dtype, lr_scale_b=4.0, **EXACT)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".adapters." not in key}
    optimizer, losses = adapter.optimizer(name, lr=3e-3, weight_decay=0.01), []
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 12e-3]
    for _ in range(25):
        loss = model(TOKENS).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(model.state_dict()[key].equal(tensor) for key, tensor in before.items())


def test_paged_optimizers_need_a_gpu_and_unknown_names_are_told() -> None:
    adapter = tg.apply(plain(), "qlora", SITES, rank=2)
    with pytest.raises(tg.ConfigError, match=r"paged_adamw_32bit pages .* on cpu, which has no paging; use 'adamw_32bit'"):
        adapter.optimizer("paged_adamw_32bit", lr=1e-3)
    with pytest.raises(tg.ConfigError, match=r"no optimizer 'adamw_8bits'; near names: adamw_8bit"):
        adapter.optimizer("adamw_8bits", lr=1e-3)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its new name is not in all of transformers 5
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = build("llama").train()
        adapter = tg.apply(model, "qlora", rank=4, **EXACT)
        perturb_(adapter.parameters())
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(TOKENS, labels=TOKENS).loss.backward()
        found.append({name: parameter.grad for name, parameter in adapter.named_parameters()})
    assert all(gradient.abs().max() > 0 for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def saved(directory: Path, **options: Any) -> Tensor:
    model = plain()
    adapter = tg.apply(model, "qlora", SITES, rank=2, **EXACT, **options)
    perturb_(adapter.parameters())
    adapter.save(directory)
    return model(TOKENS)


def quantised(seed: int = 0, **options: Any) -> nn.Module:
    model = plain(seed)
    tg.apply(model, "qlora", SITES, rank=2, **EXACT, **options).detach()
    return model


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_saved_adapter_computes_the_same_on_16_bit_and_4_bit_bases(options: dict[str, Any], tmp_path: Path) -> None:
    want = saved(tmp_path, **options)
    for base in (plain(), quantised(**options)):
        loaded = tg.load(base, tmp_path)
        assert loaded.method == "qlora"
        assert all(same(contents(base.get_submodule(name)), by_hand(plain().get_submodule(name).weight, **options)) for name in SITES)
        assert base(TOKENS).equal(want)


def test_the_record_says_how_the_weights_were_quantised(tmp_path: Path) -> None:
    saved(tmp_path, quant_type="fp4", double_quant=False, block_size=128)
    record = json.loads((tmp_path / "torchgraft.json").read_text())
    assert record["method"]["name"] == "qlora"
    for site in record["sites"]:
        assert (site["kind"], site["dtype"]) == ("Linear", "float32")
        assert site["shape"] == list(plain().get_submodule(site["name"]).weight.shape)
        assert site["quantization"] == {"type": "fp4", "block_size": 128, "double": False}
        assert site["fingerprint"]


@pytest.mark.parametrize("make", [plain, quantised], ids=["16 bit", "quantised by us"])
def test_an_adapter_on_another_base_is_refused(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    saved(tmp_path)
    other = make(seed=1)
    before = [type(module) for module in other.modules()]
    with pytest.raises(tg.PairingError, match=r"^.*attn\.q_proj: "):
        tg.load(other, tmp_path)
    assert [type(module) for module in other.modules()] == before


def test_weights_in_other_codes_are_told(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.warns(tg.TorchgraftWarning, match=r"attn\.q_proj and 1 more: it was trained on quantized weights.*fp4"):
        tg.load(quantised(quant_type="fp4"), tmp_path)


class FourBit(nn.Module):
    """Layers that bitsandbytes itself has made."""

    is_loaded_in_4bit = True  # what PEFT looks for

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.bfloat16, quant_type="nf4")
        self.down = bnb.nn.Linear4bit(96, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
        self.to(torch.bfloat16).to("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("writer", ["peft", "torchgraft"])
def test_peft_and_we_compute_the_same_on_the_same_4_bit_weights(writer: str, tmp_path: Path) -> None:
    theirs, ours = FourBit(), FourBit()
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    base = FourBit()(x)
    if writer == "peft":
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["up", "down"], r=4, lora_alpha=6))
        perturb_([parameter for parameter in theirs.parameters() if parameter.requires_grad])
        theirs.save_pretrained(tmp_path)
        tg.load(ours, tmp_path)
    else:
        adapter = tg.apply(ours, "qlora", ["up", "down"], rank=4, alpha=6.0)
        perturb_(adapter.parameters())
        adapter.save(tmp_path)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).train()  # in eval, CPUs with AVX512-BF16 round once more
    assert {type(m).__module__ for m in theirs.modules() if hasattr(m, "base_layer")} == {"peft.tuners.lora.bnb"}
    assert error(ours(x), theirs(x)) < 1e-3
    assert error(ours(x), base) > 0.1


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
def test_matched_layers_are_quantised_while_they_are_read(options: dict[str, Any], checkpoint: Path) -> None:
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


def test_by_default_every_matrix_but_the_head_is_quantised_and_the_model_runs(checkpoint: Path) -> None:
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
    quantised = [[name for name, m in each.named_modules() if isinstance(m, bnb.nn.Linear4bit)] for each in (model, again)]
    assert len(quantised[0]) == 4
    assert quantised[0] == quantised[1]
    assert logits(again).equal(logits(model))


def test_adapters_know_the_checkpoint_that_a_quantised_model_came_from(checkpoint: Path, tmp_path: Path) -> None:
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
    "quantised already": (lambda path: write(tg.load_quantized(llama(path / "base")), path / "4bit"), {}, tg.TorchgraftError, "quantiz"),
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
