"""Methods that change a layer's bias, too: in memory, in files, under other adapters, and on layers that have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import torchgraft as tg
from models import perturb_
from thirdparty import bitfit, registered
from torchgraft.in_memory import merge
from torchgraft.layers.of_module import sharing_bias

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: (nn.Linear(6, 10), torch.randn(3, 6)),
    "square": lambda: (nn.Linear(7, 7), torch.randn(3, 7)),
    "Conv1D": lambda: (_filled(Conv1D(10, 6)), torch.randn(3, 6)),
    "Conv2d": lambda: (nn.Conv2d(4, 6, 3, groups=2, stride=2), torch.randn(2, 4, 7, 7)),
}


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered("bitfit", "ia3"):
        yield


def _filled(layer: nn.Module) -> nn.Module:
    nn.init.normal_(layer.bias)
    return layer


def _model(layer: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(layer).to(dtype).eval()


def _changed(method: str, params: dict[str, Tensor], bias: Tensor) -> Tensor:
    """The bias that the method should give, in float64."""
    wide = bias.double()
    return wide + params["delta"].double() if method == "bitfit" else wide * params["l"].double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("method", "layer"), [("bitfit", "Linear"), ("bitfit", "Conv2d"), ("bitfit", "Conv1D"), ("ia3", "square"), ("ia3", "Conv1D")]
)
def test_the_bias_is_merged_and_comes_back_to_the_last_bit(method: str, layer: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = LAYERS[layer]()
    model, x = _model(module, dtype), x.to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = tg.apply(model, method, targets=["0"])
    perturb_(adapter.parameters())
    forward = model(x)
    assert not torch.equal(forward, _without(adapter, model, x))
    adapter.merge()
    expected = _changed(method, adapter.parts["0"].tensors(), before["0.bias"]).to(dtype)
    torch.testing.assert_close(model[0].bias, expected, rtol=0, atol=0)
    torch.testing.assert_close(model(x), forward, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
    adapter.unmerge()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items() if key in before)
    torch.testing.assert_close(model(x), forward, rtol=0, atol=0)


def _without(adapter: tg.Adapter, model: nn.Module, x: Tensor) -> Tensor:
    with adapter.disabled():
        return model(x)


def test_an_edited_bias_is_not_unmerged() -> None:
    model = _model(nn.Linear(6, 10))
    adapter = tg.apply(model, "ia3", targets=["0"])
    perturb_(adapter.parameters())
    adapter.merge()
    with torch.no_grad():
        model[0].bias[3] += 1
    with pytest.raises(tg.MergeError, match="bias was changed after the merge"):
        adapter.unmerge()


def test_a_quantized_layer_is_merged_with_its_bias_and_gets_both_back() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = nn.Linear(64, 32)
    model = nn.Sequential(tg.quantized_linear(dense, tg.Quantization(compute_dtype="float32"))).eval()
    x, bias = torch.randn(3, 64), model[0].bias
    adapter = tg.apply(model, "ia3", targets=["0"])
    perturb_(adapter.parameters())
    forward = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), forward)
    assert not torch.equal(model[0].bias, bias)
    adapter.unmerge()
    assert model[0].bias is bias
    torch.testing.assert_close(model(x), forward)


@pytest.mark.parametrize("merged", [False, True])
def test_dora_above_takes_the_changed_bias_out(merged: bool) -> None:
    """h = W'x + l·b, with W' made of diag(l)·W: the earlier adapter changes both."""
    torch.manual_seed(0)
    model, x = _model(nn.Linear(6, 10), torch.float64), torch.randn(3, 6, dtype=torch.float64)
    beneath = tg.apply(model, "ia3", targets=["0"], name="beneath")
    perturb_(beneath.parameters())
    above = tg.apply(model, "dora", targets=["0"], name="above", rank=2, dtype="float64")
    perturb_(above.parameters())
    params, scale = above.parts["0"].tensors(), above.config.scale
    factors = beneath.parts["0"].tensors()["l"].double()
    with torch.no_grad():
        v = factors[:, None] * model[0].weight + scale * params["B"] @ params["A"]
        expected = x @ (params["m"][:, None] * v / v.norm(dim=1, keepdim=True)).T + factors * model[0].bias
    if merged:
        beneath.merge()
    torch.testing.assert_close(model(x), expected)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    root = tmp_path / "model"
    root.mkdir()
    tensors = {"a.q_proj.weight": torch.randn(10, 6), "a.q_proj.bias": torch.randn(10), "b.o_proj.weight": torch.randn(6, 10)}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    (root / "config.json").write_text('{"model_type": "llama"}')
    return root


def _tree(checkpoint: Path) -> nn.Module:
    model = nn.ModuleDict({"a": nn.ModuleDict({"q_proj": nn.Linear(6, 10)}), "b": nn.ModuleDict({"o_proj": nn.Linear(10, 6, bias=False)})})
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    return model


def _saved(checkpoint: Path, method: str, targets: list[str], seed: int = 1) -> tuple[Path, dict[str, Tensor]]:
    """An adapter that was trained on the checkpoint's model, and its tensors for a.q_proj."""
    adapter = tg.apply(_tree(checkpoint), method, targets=targets)
    perturb_(adapter.parameters(), seed=seed)
    target = checkpoint.parent / f"{method}-{seed}"
    adapter.save(target)
    return target, {key: tensor.detach() for key, tensor in adapter.parts["a.q_proj"].tensors().items()}


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
@pytest.mark.parametrize(("method", "targets", "merged"), [("bitfit", ["q_proj"], 1), ("ia3", ["q_proj", "o_proj"], 3)])
def test_files_are_merged_with_their_biases_and_given_back(
    checkpoint: Path, tmp_path: Path, method: str, targets: list[str], merged: int, dtype: str
) -> None:
    """bitfit has no adapter_merge: weights are copied."""
    adapter, params = _saved(checkpoint, method, targets)
    report = tg.merge_checkpoint(checkpoint, adapter, tmp_path / "merged", dtype=dtype)
    assert report.merged_tensors == merged
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    expected = _changed(method, params, before["a.q_proj.bias"]).to(after["a.q_proj.bias"].dtype)
    assert torch.equal(after["a.q_proj.bias"], expected)
    assert after["a.q_proj.bias"].dtype == (torch.bfloat16 if dtype else torch.float32)
    tg.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_two_adapters_change_a_bias_with_their_factors(checkpoint: Path, tmp_path: Path) -> None:
    (one, first), (other, second) = (_saved(checkpoint, "bitfit", ["q_proj"], seed) for seed in (1, 2))
    tg.merge_checkpoint(checkpoint, {one: 0.5, other: -2.0}, tmp_path / "merged")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    expected = before["a.q_proj.bias"].double() + 0.5 * first["delta"].double() - 2.0 * second["delta"].double()
    torch.testing.assert_close(after["a.q_proj.bias"], expected.float(), rtol=0, atol=0)
    assert torch.equal(after["a.q_proj.weight"], before["a.q_proj.weight"])
    tg.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_a_changed_bias_is_noticed_when_unmerging(checkpoint: Path, tmp_path: Path) -> None:
    adapter, _ = _saved(checkpoint, "ia3", ["q_proj"])
    tg.merge_checkpoint(checkpoint, adapter, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors["a.q_proj.bias"][2] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(tg.MergeError, match=r"a\.q_proj\.bias"):
        tg.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")


def test_a_base_without_the_bias_is_refused(checkpoint: Path) -> None:
    adapter, _ = _saved(checkpoint, "bitfit", ["q_proj"])
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["a.q_proj.bias"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(tg.PairingError, match=r"a\.q_proj: the adapter's layer has a bias and the base has none"):
        tg.merge_checkpoint(checkpoint, adapter, checkpoint.parent / "merged")


def test_a_method_can_refuse_a_layer_without_a_bias(checkpoint: Path) -> None:
    with pytest.raises(tg.ConfigError, match=r"b\.o_proj: it has no bias to train"):
        tg.apply(_tree(checkpoint), "bitfit", targets=["o_proj"])


def test_a_changed_bias_is_not_exported_as_a_lora(checkpoint: Path, tmp_path: Path) -> None:
    adapter, _ = _saved(checkpoint, "ia3", ["q_proj"])
    with pytest.raises(tg.MergeError, match=r"a\.q_proj: ia3 changes its bias"):
        tg.export_adapter(adapter, tmp_path / "lora", "lora", base=checkpoint, rank=2)


@pytest.mark.parametrize("how", ["the same Parameter", "the same memory", "a part of a weight"])
def test_a_bias_that_is_shared_is_not_merged_into(how: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4), "c": nn.Linear(4, 4)})
    if how == "the same Parameter":
        model["b"].bias = model["a"].bias
    else:
        memory = model["a"].bias.data if how == "the same memory" else model["c"].weight.data[1]
        model["a"].bias, model["b"].bias = nn.Parameter(memory), nn.Parameter(torch.zeros(4) if how != "the same memory" else memory)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = tg.apply(model, "bitfit", targets=["a"])
    perturb_(adapter.parameters())
    with pytest.raises(tg.MergeError, match=r"a: its bias shares memory with (b\.bias|c\.weight), so merging would change both"):
        adapter.merge()
    adapter.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_bias_under_two_names_of_one_layer_is_its_own() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    model = nn.ModuleDict({"a": layer, "alias": layer})
    before, adapter = layer.bias.detach().clone(), tg.apply(model, "bitfit", targets=["a"])
    perturb_(adapter.parameters())
    expected = model["alias"](x)
    adapter.merge()
    assert not torch.equal(layer.bias, before)
    torch.testing.assert_close(model["alias"](x), expected)
    adapter.unmerge()
    assert torch.equal(layer.bias, before)


def test_a_bias_that_cannot_be_written_leaves_the_weight_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].bias = nn.Parameter(torch.zeros(1).expand(4))
    before = model[0].weight.detach().clone()
    adapter = tg.apply(model, "ia3", targets=["0"])
    perturb_(adapter.parameters())
    with pytest.raises(tg.MergeError, match="0: its bias was expanded"):
        adapter.merge()
    assert torch.equal(model[0].weight, before)
    assert not adapter.merged


def test_of_several_tensors_all_are_written_or_none() -> None:
    weight, expanded = torch.ones(2, 2), torch.zeros(1).expand(4)
    with pytest.raises(RuntimeError, match="written-to tensor"):
        merge._write({"weight": weight, "bias": expanded}, {"weight": torch.zeros(2, 2), "bias": torch.ones(4)})
    assert torch.equal(weight, torch.ones(2, 2))


class AddsEverywhere:
    """As bitfit, without its word on layers that have no bias."""

    adapter_init, adapter_forward = staticmethod(bitfit.adapter_init), staticmethod(bitfit.adapter_forward)
    adapter_merge_bias = staticmethod(bitfit.adapter_merge_bias)

    @tg.hookimpl
    def adapter_method(self) -> tg.Method:
        return tg.Method("everywhere", tg.Config, "", "", additive=True)


def test_what_is_added_where_there_is_no_bias_is_not_merged(checkpoint: Path, tmp_path: Path) -> None:
    tg.registry().register(AddsEverywhere(), "everywhere")
    try:
        model = _tree(checkpoint)
        adapter = tg.apply(model, "everywhere", targets=["o_proj"])
        perturb_(adapter.parameters())
        adapter.save(tmp_path / "adapter")
        for merge in (
            adapter.merge,
            lambda: tg.merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "merged"),
            lambda: tg.export_adapter(tmp_path / "adapter", tmp_path / "merged", "lora", base=checkpoint, rank=2),
        ):
            with pytest.raises(tg.MergeError, match=r"b\.o_proj: everywhere adds to the layer's bias, and the layer has none"):
                merge()
        assert not (tmp_path / "merged").exists()
    finally:
        tg.registry().unregister("everywhere")


def test_the_order_of_additive_adapters_does_not_matter_to_the_bias(checkpoint: Path, tmp_path: Path) -> None:
    (one, _), (other, _) = (_saved(checkpoint, "bitfit", ["q_proj"], seed) for seed in (1, 2))
    scaling, _ = _saved(checkpoint, "ia3", ["q_proj"], seed=3)
    results = []
    for number, adapters in enumerate(({one: 1.0, other: 0.5}, {other: 0.5, one: 1.0})):
        tg.merge_checkpoint(checkpoint, adapters, tmp_path / str(number))
        results.append(load_file(tmp_path / str(number) / "model.safetensors")["a.q_proj.bias"])
    torch.testing.assert_close(*results, rtol=1e-7, atol=0)
    report = tg.merge_checkpoint(checkpoint, {one: 1.0, scaling: 1.0}, tmp_path / "ordered")
    assert any("merged in this order" in note for note in report.notes)


def test_an_input_side_ia3_leaves_the_bias_alone_and_can_be_exported(checkpoint: Path, tmp_path: Path) -> None:
    adapter = tg.apply(_tree(checkpoint), "ia3", targets=["q_proj"], side="input")
    perturb_(adapter.parameters())
    adapter.save(tmp_path / "adapter")
    assert tg.export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", base=checkpoint, rank=2).sites == 1


def test_weights_are_left_alone_where_only_biases_change() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
    with torch.no_grad():
        model["a"].weight[0, 0] = -0.0
    model["b"].weight = model["a"].weight  # which would be refused if it were written
    before = model["a"].weight.detach().clone().view(torch.int32)
    adapter = tg.apply(model, "bitfit", targets=["a", "b"])
    perturb_(adapter.parameters())
    x = torch.randn(3, 6)
    expected = model["a"](x)
    adapter.merge()
    assert torch.equal(model["a"].weight.view(torch.int32), before)
    torch.testing.assert_close(model["a"](x), expected)
    adapter.unmerge()
    torch.testing.assert_close(model["a"](x), expected, rtol=0, atol=0)


def test_a_quantized_layer_stays_so_where_only_its_bias_changes() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(tg.quantized_linear(nn.Linear(64, 32), tg.Quantization(compute_dtype="float32"))).eval()
    x = torch.randn(3, 64)
    model(x)
    adapter = tg.apply(model, "bitfit", targets=["0"])
    perturb_(adapter.parameters())
    expected, bias, codes = model(x), model[0].bias.detach().clone(), model[0].weight
    adapter.merge()
    assert model[0].weight is codes
    torch.testing.assert_close(model(x), expected)
    adapter.unmerge()
    assert torch.equal(model[0].bias, bias)


def test_a_shared_bias_that_is_left_alone_is_no_obstacle() -> None:
    model, x = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)}), torch.randn(3, 6)
    model["b"].bias = model["a"].bias
    weight, bias = model["a"].weight.detach().clone(), model["a"].bias.detach().clone()
    adapter = tg.apply(model, "ia3", targets=["a"], side="input")
    perturb_(adapter.parameters())
    expected, other = model["a"](x), model["b"](x)
    adapter.merge()
    assert not torch.equal(model["a"].weight, weight)
    assert torch.equal(model["a"].bias, bias)
    torch.testing.assert_close(model["a"](x), expected)
    torch.testing.assert_close(model["b"](x), other, rtol=0, atol=0)
    adapter.unmerge()
    assert torch.equal(model["a"].weight, weight)


def test_shared_biases_are_found_quickly_in_one_piece_of_memory() -> None:
    flat = torch.zeros(4000 * 20)
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(4000))
    for number, layer in enumerate(model):
        layer.weight = nn.Parameter(flat[20 * number : 20 * number + 16].view(4, 4))
        layer.bias = nn.Parameter(flat[20 * number + 16 : 20 * number + 20])
    assert sharing_bias(model) == {}
    model[7].bias = nn.Parameter(flat[20 * 3 + 15 : 20 * 3 + 19])
    assert sharing_bias(model) == {"7": "3.weight", "3": "7.bias"}
