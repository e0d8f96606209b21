"""Methods of other authors, as plugins: each computes its paper's formula, merges into it and comes back, on several kinds of layer."""

from __future__ import annotations

import ast
import io
import pickle
import tokenize
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import torchgraft as tg
from models import perturb_
from thirdparty import EXAMPLES, NAMES, bitfit, registered

OPTIONS: dict[str, dict[str, object]] = {"loha": {"rank": 3, "alpha": 2.0}, "oft": {"blocks": 2}, "vera": {"rank": 5}}
LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: (nn.Linear(6, 10), torch.randn(3, 6)),
    "square": lambda: (nn.Linear(8, 8, bias=False), torch.randn(2, 3, 8)),
    "Conv2d": lambda: (nn.Conv2d(4, 6, 3, groups=2, stride=2), torch.randn(2, 4, 7, 7)),
    "Embedding": lambda: (nn.Embedding(9, 4), torch.tensor([[1, 8, 0], [3, 3, 7]])),
}


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered(*NAMES):
        yield


def _adapted(method: str, weight: Tensor, bias: Tensor | None, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The paper's formula on the matrix (out, in) and the bias, in float64."""
    p = {name: tensor.double() for name, tensor in params.items()}
    if method == "bitfit":
        return weight, None if bias is None else bias + p["delta"]
    if method == "ia3":
        return p["l"][:, None] * weight, None if bias is None else p["l"] * bias
    if method == "loha":
        return weight + 2 / 3 * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"]), bias
    if method == "vera":
        a, b = p["A"][:, : weight.shape[1]], p["B"][: len(weight)]
        return weight + torch.diag(p["b"]) @ b @ torch.diag(p["d"]) @ a, bias
    blocks = []
    for q in p["Q"]:
        skew, one = q.triu(1) - q.triu(1).T, torch.eye(len(q), dtype=torch.float64)
        blocks.append((one + skew) @ torch.linalg.inv(one - skew))
    rotation = torch.block_diag(*blocks)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(weight), dtype=torch.float64))
    return rotation @ weight, bias


def _output(layer: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """What the layer gives with this matrix and bias."""
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight.T)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x.double(), weight.reshape(layer.weight.shape), bias, layer.stride, groups=layer.groups)
    return F.linear(x.double(), weight, bias)


CASES = [
    (method, layer)
    for method in NAMES
    for layer in LAYERS
    if not (method == "ia3" and layer in ("Conv2d", "Embedding")) and not (method == "bitfit" and layer in ("square", "Embedding"))
]


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_a_method_is_its_papers_formula(method: str, layer: str) -> None:
    torch.manual_seed(0)
    module, x = LAYERS[layer]()
    model, before = nn.Sequential(module), {key: tensor.clone() for key, tensor in module.state_dict().items()}
    adapter = tg.apply(model, method, ["0"], **OPTIONS.get(method, {}))
    torch.testing.assert_close(model(x), _output(module, *_canonical(layer, before), x).float())
    perturb_(adapter.parameters())
    weight, bias = _adapted(method, *_canonical(layer, before), adapter.parts["0"].params())
    expected = _output(module, weight, bias, x)
    assert (expected - _output(module, *_canonical(layer, before), x)).abs().max() > 0.01
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    adapter.merge()
    merged, merged_bias = _canonical(layer, module.state_dict())
    torch.testing.assert_close(merged, weight.float().double(), rtol=1e-6, atol=1e-7)
    if bias is not None:
        torch.testing.assert_close(merged_bias, bias.float().double(), rtol=1e-6, atol=1e-7)
    adapter.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def _canonical(layer: str, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    weight, bias = state["weight"].double(), state.get("bias")
    matrix = weight.T if layer == "Embedding" else weight.flatten(1)
    return matrix, None if bias is None else bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", NAMES)
def test_files_are_merged_and_given_back(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(6, 10), "o_proj": nn.Linear(10, 6)}).to(dtype)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file(before, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    adapter = tg.apply(model, method, ["*_proj"], **OPTIONS.get(method, {}))
    perturb_(adapter.parameters())
    adapter.save(tmp_path / "adapter")
    tg.merge_checkpoint(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, part in adapter.parts.items():
        expected = _adapted(method, before[f"{name}.weight"].double(), before[f"{name}.bias"].double(), part.params())
        for key, tensor in zip(("weight", "bias"), expected, strict=True):
            bound = torch.finfo(dtype).eps
            torch.testing.assert_close(merged[f"{name}.{key}"].double(), tensor, rtol=bound, atol=bound / 100)
    tg.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


@pytest.fixture
def three() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(6, 10), "b": nn.Linear(8, 4), "c": nn.Linear(6, 10)})


def test_vera_has_one_pair_of_random_matrices_and_saves_none(three: nn.Module, tmp_path: Path) -> None:
    base = deepcopy(three)
    adapter = tg.apply(three, "vera", ["*"], rank=5, projection_seed=3)
    perturb_(adapter.parameters())
    assert {name.rpartition(".")[2] for name, _ in adapter.named_parameters()} == {"b", "d"}
    assert not [key for key in three.state_dict() if key.endswith((".A", ".B"))]
    for copy in (three, deepcopy(three), pickle.loads(pickle.dumps(three)), deepcopy(three).double(), deepcopy(three).to("meta")):
        a, b, c = (part.params() for part in tg.adapters(copy)["default"].parts.values())
        assert a["A"] is b["A"] is c["A"]
        assert (a["A"].shape, a["B"].shape, a["A"].dtype, a["A"].device) == ((5, 8), (10, 5), a["d"].dtype, a["d"].device)
    adapter.save(tmp_path)
    assert set(load_file(tmp_path / "torchgraft.safetensors")) == {f"{name}.{key}" for name in "abc" for key in "bd"}
    tg.load(base, tmp_path)
    for name, x in {"a": torch.randn(3, 6), "b": torch.randn(3, 8)}.items():
        torch.testing.assert_close(base[name](x), three[name](x), rtol=0, atol=0)
    mine, its = (tg.apply(deepcopy(three), "vera", ["a"], name="other", rank=5, projection_seed=seed).parts["a"] for seed in (3, 4))
    assert not torch.equal(mine.params()["A"], its.params()["A"])


def test_a_layer_that_is_moved_takes_nothing_from_the_others(three: nn.Module) -> None:
    perturb_(tg.apply(three, "vera", ["*"], rank=5).parameters())
    x = torch.randn(3, 6)
    expected = three["a"](x)
    three["b"].to("meta")
    three["c"].double()
    torch.testing.assert_close(three["a"](x), expected, rtol=0, atol=0)
    assert three["c"](x.double()).dtype == torch.float64


def test_what_is_shared_has_its_values_after_the_meta_device(three: nn.Module) -> None:
    perturb_(tg.apply(three, "vera", ["*"], rank=5).parameters())
    state, x = three.state_dict(), torch.randn(3, 6)
    again = nn.ModuleDict({"a": nn.Linear(6, 10), "b": nn.Linear(8, 4), "c": nn.Linear(6, 10)}).to("meta")
    tg.apply(again, "vera", ["*"], rank=5)
    again.to_empty(device="cpu").load_state_dict(state)
    torch.testing.assert_close(again["a"](x), three["a"](x), rtol=0, atol=0)


def test_other_shared_tensors_than_in_training_are_refused(three: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = deepcopy(three)
    tg.apply(three, "vera", ["*"], rank=5).save(tmp_path)
    rand = torch.Tensor.uniform_
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *bounds, **options: 2 * rand(self, *bounds, **options))
    with pytest.raises(tg.PairingError, match="the tensors that its layers share are not saved, and vera now creates others"):
        tg.load(base, tmp_path)
    assert not tg.adapters(base)


def test_a_name_of_its_own_and_a_shared_one_are_not_the_same() -> None:
    class Twice:
        """bitfit, with its only tensor made a second time."""

        adapter_init, adapter_forward = staticmethod(bitfit.adapter_init), staticmethod(bitfit.adapter_forward)
        adapter_merge_bias = staticmethod(bitfit.adapter_merge_bias)

        @tg.hookimpl
        def adapter_method(self) -> tg.Method:
            return tg.Method("twice", tg.Config, "", "")

        @tg.hookimpl
        def adapter_shared(self) -> dict[str, Tensor]:
            return {"delta": torch.zeros(3)}

    tg.registry().register(Twice(), "twice")
    try:
        with pytest.raises(tg.PluginError, match="0: twice makes delta by adapter_init and by adapter_shared"):
            tg.apply(nn.Sequential(nn.Linear(6, 4)), "twice", ["0"])
    finally:
        tg.registry().unregister("twice")


@pytest.mark.parametrize("method", NAMES)
def test_it_passes_the_kit(method: str) -> None:
    report = tg.testing.check_plugin(method)
    print(report.verdict)
    assert report.passed >= 25


def test_ia3_takes_at_most_40_lines_of_code() -> None:
    source = (EXAMPLES / "torchgraft-ia3" / "torchgraft_ia3.py").read_text()
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in layout]
    used = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    owners = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)]
    docstrings = [node.body[0] for node in owners if ast.get_docstring(node)]
    used -= {line for text in docstrings for line in range(text.lineno, text.end_lineno + 1)}
    assert 20 < len(used) <= 40
