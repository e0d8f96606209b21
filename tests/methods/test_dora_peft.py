"""DoRA in files: PEFT's format both ways, with PEFT itself as the reference, and checkpoints merged and restored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
import torchgraft as tg
from dora_reference import adapted, weight_with
from one_layer import DTYPES, TOKENS, as_stored, canonical, input_of, own_dtype, plain
from peft_reference import CLOSE, CONVOLUTIONS, FILES, GROUPED, WARNINGS_OF_PEFT, alone, build, image_for, peft_reads, peft_trains, run
from references import tree
from saved_adapters import edit_tensors
from torchgraft.adapter_files.reading import read_adapter
from torchgraft.pairing.base import base_of_module
from torchgraft.pairing.matching import pair

pytestmark = WARNINGS_OF_PEFT

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain, all kinds": ("plain", {"targets": ["@all"], "rank": 4}),
    "llama": ("llama", {}),
    "llama, embeddings and head": ("llama", {"targets": ["@all"], "rank": 3}),
    "gpt2, Conv1D": ("gpt2", {"targets": ["*.{c_attn,c_proj,c_fc}", "wpe"], "rank": 4}),
    "bert, a new head": ("bert", {"targets": ["query", "value", "word_embeddings"], "also_train": ["classifier"]}),
    "ranks and alphas of their own": (
        "llama",
        {"overrides": {"*.layers.1.*.q_proj": {"rank": 2}, "v_proj": {"rank": 11, "alpha": 3.0}, "up_proj": {"alpha": 40.0}}},
    ),
    "own scalings": ("llama", {"scaling": "alpha/sqrt(r)", "overrides": {"q_proj": {"scaling": "none"}, "o_proj": {"scaling": "alpha/r"}}}),
    "pissa": ("llama", {"init": "pissa", "rank": 3, "overrides": {"v_proj": {"rank": 2}}}),
    "pissa on all kinds": ("plain", {"init": "pissa", "targets": ["@all"], "rank": 2}),
}


@pytest.mark.parametrize(("family", "options"), OURS.values(), ids=OURS)
def test_peft_computes_our_adapter(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(family)
    before = run(model, family)
    adapter = tg.apply(model, "dora", **options)
    models.perturb_(adapter.parameters(), 0.2)
    ours = run(model, family)
    assert (ours - before).abs().max() > 1e-2
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"]) == ("LORA", True)
    written = load_file(tmp_path / "adapter_model.safetensors")
    magnitudes = [name for name in written if name.endswith(".lora_magnitude_vector")]
    assert len(magnitudes) == len(adapter.sites)
    torch.testing.assert_close(run(peft_reads(build(family), tmp_path), family), ours, **CLOSE)

    (tmp_path / "torchgraft.json").unlink()  # and so as PEFT would have written it
    again = build(family)
    assert {site.name for site in tg.load(again, tmp_path).sites} == {site.name for site in adapter.sites}
    torch.testing.assert_close(run(again, family), ours, **CLOSE)


PEFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain, all kinds": ("plain", {"target_modules": ["embed", "conv", "q_proj", "out_proj", "0", "2", "head"]}),
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 3}),
    "llama, patterns": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    ),
    "gpt2, Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wpe"], "fan_in_fan_out": True}),
    "bert, a new head": ("bert", {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}),
    "rank-stabilized": ("llama", {"target_modules": ["v_proj"], "use_rslora": True, "r": 5}),
    "dropout": ("llama", {"target_modules": ["v_proj"], "lora_dropout": 0.5}),
    "llama, embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize(("family", "options"), PEFTS.values(), ids=PEFTS)
def test_we_compute_peft_s_adapter(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    trained, model = peft_trains(build(family), tmp_path, use_dora=True, **options), build(family)
    before, theirs = run(model, family), run(trained, family)
    assert (theirs - before).abs().max() > 1e-2
    adapter = tg.load(model, tmp_path)
    assert adapter.method == "dora"
    torch.testing.assert_close(run(model, family), theirs, **CLOSE)
    assert adapter.count().trainable == sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert pair(read_adapter(tmp_path), base_of_module(build(family))).problems == ()


@pytest.mark.parametrize("layer", (CONVOLUTIONS | GROUPED).values(), ids=CONVOLUTIONS | GROUPED)
@torch.no_grad()
def test_peft_computes_our_convolution(layer: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, again = alone(layer), alone(layer)
    x = image_for(model)
    adapter = tg.apply(model, "dora", ["layer"], rank=2)
    models.perturb_(adapter.parameters(), 0.2)
    adapter.save(tmp_path)
    magnitude = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.layer.lora_magnitude_vector"]
    assert magnitude.shape == (1, model.layer.out_channels, *(1,) * (x.dim() - 2))
    torch.testing.assert_close(peft_reads(alone(layer), tmp_path)(x), model(x), **CLOSE)
    assert (model(x) - alone(layer)(x)).abs().max() > 1e-2
    (tmp_path / "torchgraft.json").unlink()
    tg.load(again, tmp_path)
    torch.testing.assert_close(again(x), model(x), **CLOSE)


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@torch.no_grad()
def test_we_compute_peft_s_convolution(layer: Callable[[], nn.Module], tmp_path: Path) -> None:
    trained, model = peft_trains(alone(layer), tmp_path, target_modules=["layer"], r=3, lora_alpha=5, use_dora=True), alone(layer)
    x = image_for(model)
    tg.load(model, tmp_path)
    torch.testing.assert_close(model(x), trained(x), **CLOSE)
    assert (model(x) - alone(layer)(x)).abs().max() > 1e-2


@pytest.mark.parametrize("layer", ["linear", "hf-conv1d", "conv2d-plain"])
def test_peft_drops_the_same_inputs_in_training(layer: str) -> None:
    module = plain(layer)
    theirs = peft.get_peft_model(
        nn.Sequential(deepcopy(module)),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True, lora_dropout=0.4, fan_in_fan_out=layer == "hf-conv1d"),
    )
    model, adapter = adapted(module, dropout=0.4)
    part, x = adapter.parts["0"], input_of(module)
    for name, parameter in theirs.named_parameters():
        for end, ours in (("lora_A.default.weight", part.A), ("lora_B.default.weight", part.B), ("vector.default.weight", part.m)):
            if name.endswith(end):
                parameter.data = ours.detach().reshape(parameter.shape).clone()
    outputs = []
    for trained in (model, theirs):
        torch.manual_seed(4)
        outputs.append(trained.train()(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], **CLOSE)
    gradients = {name: parameter.grad.flatten() for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    for mark, ours in (("lora_A", part.A), ("lora_B", part.B), ("magnitude", part.m)):
        (gradient,) = (value for name, value in gradients.items() if mark in name)
        torch.testing.assert_close(ours.grad.flatten(), gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("record", [True, False], ids=["with our record", "as plain PEFT"])
def test_a_missing_or_strange_tensor_is_refused_by_name(record: bool, tmp_path: Path) -> None:
    site = "model.layers.1.self_attn.q_proj"
    name = f"base_model.model.{site}.lora_magnitude_vector"
    damages: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
        "missing": (lambda tensors: tensors.pop(name), f"the tensor '{name}' is missing from adapter_model.safetensors"),
        "short": (lambda t: t.update({name: t[name][1:]}), f"the tensor '{name}' has the shape [31], expected [32]"),
        "flat": (lambda t: t.update({name: t[name][None]}), f"the tensor '{name}' has the shape [1, 32], expected [32]"),
        "old name": (lambda t: t.update({f"{name}.weight": t[name] + 1}), f"{site}: unexpected adapter tensor {name}.weight"),
    }
    for case, (change, says) in damages.items():
        directory = tmp_path / case
        tg.apply(build("llama"), "dora", ["q_proj"]).save(directory)
        if not record:
            (directory / "torchgraft.json").unlink()
        assert pair(read_adapter(directory), base_of_module(build("llama"))).problems == ()
        edit_tensors(directory, change)
        assert pair(read_adapter(directory), base_of_module(build("llama"))).problems == (says,)
        model = build("llama")
        with pytest.raises(tg.PairingError):
            tg.load(model, directory)
        assert tg.adapters(model) == {}


def test_a_magnitude_in_a_plain_lora_is_left_over_and_refused(tmp_path: Path) -> None:
    tg.apply(build("llama"), "dora", ["q_proj"]).save(tmp_path)
    (tmp_path / "torchgraft.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    problems = pair(read_adapter(tmp_path), base_of_module(build("llama"))).problems
    assert len(problems) == 2
    assert all("unexpected adapter tensor" in problem and "lora_magnitude_vector" in problem for problem in problems)


@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_what_we_save_we_load_bit_for_bit(init: str, own: str, tmp_path: Path) -> None:
    options = {"targets": ["@all"], "rank": 2, "init": init, "dtype": own, "overrides": {"head": {"alpha": 3.0}}}
    adapter = tg.apply(build("plain"), "dora", **options)
    models.perturb_(adapter.parameters())
    adapter.save(tmp_path / "first")
    model = build("plain")
    again = tg.load(model, tmp_path / "first")
    for name, part in adapter.parts.items():
        assert again.parts[name].config == part.config
        found = again.parts[name].tensors()
        assert found.keys() == part.tensors().keys()
        assert part.m.dtype == torch.float32
        for key, tensor in part.tensors().items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
            assert isinstance(found[key], nn.Parameter) == isinstance(tensor, nn.Parameter)
    torch.testing.assert_close(model(TOKENS), adapter.model(TOKENS), rtol=0, atol=0)
    again.save(tmp_path / "second")
    for file in FILES:
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def write(model: nn.Module, folder: Path) -> None:
    if isinstance(model, models.Plain):
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    else:
        model.save_pretrained(folder, max_shard_size="30KB")


CHECKPOINTS = {"plain": ["@all"], "gpt2": ["c_attn", "c_proj", "wpe"], "llama": ["@all"]}


@pytest.mark.parametrize("strength", [0.02, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_checkpoint_is_merged_and_every_file_given_back(family: str, dtype: str, strength: float, tmp_path: Path) -> None:
    model = build(family).to(DTYPES[dtype])
    modules = dict(model.named_modules())
    first = next(module for name, module in modules.items() if name.endswith(("q_proj", "c_attn")))
    with torch.no_grad():  # a row without a direction
        first.weight.copy_(as_stored(first, canonical(first).index_fill(0, torch.tensor([2]), 0)))
    write(model, tmp_path / "base")
    original = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "base").iterdir()}
    adapter = tg.apply(model, "dora", targets=CHECKPOINTS[family], rank=3, alpha=5.0, dtype=own_dtype(dtype))
    models.perturb_(adapter.parameters(), strength)
    adapter.save(tmp_path / "adapter")
    report = tg.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (report.merged_tensors, report.verified) == (len(adapter.sites), True)

    found = {name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()}
    eps, merged_bytes = torch.finfo(DTYPES[dtype]).eps, 0
    for name, part in adapter.parts.items():
        module, tensor = modules[name], found[f"{name}.weight"]
        want = weight_with(part, canonical(module))
        assert want.isfinite().all()
        torch.testing.assert_close(tensor.double(), as_stored(module, want).contiguous(), rtol=4 * eps, atol=4 * eps)
        merged_bytes += tensor.numel() * tensor.element_size()
    kept = load_file(tmp_path / "out" / "torchgraft_undo" / "corrections.safetensors")
    norms, rest = (sum(t.numel() * t.element_size() for name, t in kept.items() if name.endswith("norm") is norm) for norm in (True, False))
    assert rest <= merged_bytes
    assert norms + rest <= merged_bytes or strength > 0.02, "of these weights of width 32, whose deviation is 0.02, little is left by 0.3"
    tg.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "back").iterdir()} == original
    assert tree(tmp_path / "back") == tree(tmp_path / "base")
