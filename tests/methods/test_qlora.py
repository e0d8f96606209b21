"""QLoRA: quantizing in place, loading in 4 bits, training, files, and PEFT on the same 4-bit weights."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from four_bit import EXACT, TOKENS, WAYS, by_hand, contents, error, same
from models import Plain, build, perturb_

SITES = ["attn.q_proj", "mlp.0"]


def plain(seed: int = 0) -> Plain:
    torch.manual_seed(seed)
    return Plain().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_the_selected_layers_and_no_others_are_quantized_in_place(options: dict[str, Any], dtype: torch.dtype) -> None:
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
        r"^attn\.out_proj: the method replaces its weight, which is shared with attn\.q_proj",
    ),
    "an adapter is on it": (
        changed(lambda model: tg.apply(model, "lora", ["head"], name="other", rank=2)),
        ["mlp.0", "head"],
        r"^head: .*other adapters .*detach",
    ),
    "a convolution": (plain, ["mlp.0", "conv"], r"^conv: qlora does not work on Conv1d layers, only on Linear"),
    "an embedding": (plain, ["mlp.0", "embed"], r"^embed: qlora does not work on Embedding layers, only on Linear"),
}


@pytest.mark.parametrize(("make", "targets", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_quantized_is_refused_and_every_layer_stays(make: Callable[[], nn.Module], targets: list[str], message: str) -> None:
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


def test_layers_that_are_quantized_already_are_left_as_they_are() -> None:
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
def test_forward_is_that_of_the_dequantized_weight_and_the_factors(dtype: torch.dtype, own: torch.dtype) -> None:
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


def quantized(seed: int = 0, **options: Any) -> nn.Module:
    model = plain(seed)
    tg.apply(model, "qlora", SITES, rank=2, **EXACT, **options).detach()
    return model


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_saved_adapter_computes_the_same_on_16_bit_and_4_bit_bases(options: dict[str, Any], tmp_path: Path) -> None:
    want = saved(tmp_path, **options)
    for base in (plain(), quantized(**options)):
        loaded = tg.load(base, tmp_path)
        assert loaded.method == "qlora"
        assert all(same(contents(base.get_submodule(name)), by_hand(plain().get_submodule(name).weight, **options)) for name in SITES)
        assert base(TOKENS).equal(want)


def test_the_record_says_how_the_weights_were_quantized(tmp_path: Path) -> None:
    saved(tmp_path, quant_type="fp4", double_quant=False, block_size=128)
    record = json.loads((tmp_path / "torchgraft.json").read_text())
    assert record["method"]["name"] == "qlora"
    for site in record["sites"]:
        assert (site["kind"], site["dtype"]) == ("Linear", "float32")
        assert site["shape"] == list(plain().get_submodule(site["name"]).weight.shape)
        assert site["quantization"] == {"type": "fp4", "block_size": 128, "double": False, "compute_dtype": "float32"}
        assert site["fingerprint"]


@pytest.mark.parametrize("make", [plain, quantized], ids=["16 bit", "quantized by us"])
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
        tg.load(quantized(quant_type="fp4"), tmp_path)


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
    assert error(ours(x), theirs(x)) < 6e-3  # PEFT rounds the change to bfloat16 before it adds it
    assert error(ours(x), base) > 0.1
