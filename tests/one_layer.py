"""One layer of every kind, with what it computes written out in float64, and a small model with all kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import torchgraft as tg
from models import Plain, perturb_

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANK, ALPHA = 3, 5.0
Pair = tuple[Tensor, Tensor]
SCALES = {"alpha/r": ALPHA / RANK, "alpha/sqrt(r)": ALPHA / RANK**0.5, "none": 1.0}
SCALE = SCALES["alpha/r"]


def _convolutions() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    def make(dims: int, name: str, *args: Any, **kwargs: Any) -> tuple[str, Callable[[], nn.Module]]:
        return f"conv{dims}d-{name}", lambda: getattr(nn, f"Conv{dims}d")(*args, **kwargs)

    for dims in (1, 2, 3):
        kernel = (3, 2, 2)[:dims]
        yield make(dims, "plain", 6, 10, kernel)
        yield make(dims, "square", 8, 8, 1, bias=False)
        yield make(dims, "valid-stride", 6, 10, kernel, stride=(2, 1, 3)[:dims], padding="valid")
        yield make(dims, "groups", 6, 4, kernel, groups=2, stride=2, padding=(1, 0, 1)[:dims])
        yield make(dims, "depthwise", 6, 12, kernel, groups=6, padding=1, bias=False)
        yield make(dims, "same", 6, 8, 3, padding="same", dilation=2)
        yield make(dims, "same-even-circular", 6, 8, 4, padding="same", padding_mode="circular")
        for mode in ("zeros", "reflect", "replicate", "circular"):
            yield make(dims, mode, 4, 6, 3, padding=(2, 1, 3)[:dims], dilation=(2, 1, 1)[:dims], groups=2, padding_mode=mode)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 10),
    "linear-square": lambda: nn.Linear(8, 8),
    "linear-no-bias": lambda: nn.Linear(10, 6, bias=False),
    "hf-conv1d": lambda: Conv1D(10, 6),
    "hf-conv1d-square": lambda: Conv1D(8, 8),
    "embedding": lambda: nn.Embedding(11, 6),
    "embedding-square": lambda: nn.Embedding(8, 8),
    "embedding-padding": lambda: nn.Embedding(11, 6, padding_idx=3),
    **dict(_convolutions()),
}
ONE_OF_EACH = ("linear", "hf-conv1d-square", "embedding", "conv1d-groups", "conv2d-depthwise", "conv3d-reflect")
NOT_EMBEDDINGS = [layer for layer in LAYERS if not layer.startswith("embedding")]


def plain(layer: str, dtype: str = "float32") -> nn.Module:
    """Return the layer without an adapter, with every parameter away from its initial value."""
    torch.manual_seed(3)
    module = LAYERS[layer]()
    perturb_(list(module.parameters()), 0.2)
    return module.to(DTYPES[dtype])


def adapted(module: nn.Module, **options: Any) -> tuple[nn.Sequential, tg.Adapter]:
    """Return a model of a copy of that layer with a perturbed LoRA, and the adapter."""
    model = nn.Sequential(deepcopy(module))
    adapter = tg.apply(model, "lora", targets=["@all"], **{"rank": RANK, "alpha": ALPHA, **options})
    perturb_(adapter.parameters())
    if getattr(module, "padding_idx", None) is not None:
        adapter.parts["0"].A.data[:, module.padding_idx] = 0  # the padding column starts at zero and gets no gradient
    return model, adapter


def input_of(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (3, 9), generator=generator)
    width = module.nx if isinstance(module, Conv1D) else module.weight.shape[1] * getattr(module, "groups", 1)
    spatial = (7,) * (module.weight.dim() - 2)
    return torch.randn(*((2, width, *spatial) if spatial else (2, 5, width)), generator=generator).to(module.weight.dtype)


def as_stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """Return a matrix (out, in) in the layout in which the layer stores its weight."""
    if isinstance(module, Conv1D | nn.Embedding):
        return matrix.T
    return matrix if isinstance(module, nn.Linear) else matrix.reshape(module.out_channels, -1, *module.kernel_size)


def dense(module: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return what the layer computes with `weight` as its stored weight."""
    if isinstance(module, nn.Embedding):
        return F.embedding(x, weight, module.padding_idx)
    if isinstance(module, nn.Linear | Conv1D):
        y = x @ (weight.T if isinstance(module, nn.Linear) else weight)
    else:
        convolution = getattr(F, f"conv{x.dim() - 2}d")
        y = convolution(padded(module, x), weight, None, module.stride, 0, module.dilation, module.groups)
        bias = None if bias is None else bias.view(-1, *(1,) * (x.dim() - 2))
    return y if bias is None else y + bias


def padded(module: Any, x: Tensor) -> Tensor:
    widths: list[int] = []
    for axis in reversed(range(x.dim() - 2)):
        total = 0 if module.padding == "valid" else module.dilation[axis] * (module.kernel_size[axis] - 1)
        by_name = isinstance(module.padding, str)
        widths += [total // 2, total - total // 2] if by_name else [module.padding[axis]] * 2
    return F.pad(x, widths, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def reference(module: nn.Module, part: Any, x: Tensor, cotangent: Tensor | None = None, scale: float = SCALE) -> dict[str, Pair]:
    """Return output and gradients in float64, each with its value for absolute inputs: the size of the terms that it sums."""

    def compute(view: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        a, b, weight = (view(tensor.detach().double()).requires_grad_() for tensor in (part.A, part.B, module.weight))
        bias = None if getattr(module, "bias", None) is None else view(module.bias.detach().double())
        own_x = view(x.detach().double()).requires_grad_() if x.is_floating_point() else x
        output = dense(module, weight + scale * as_stored(module, b @ a), bias, own_x)
        found = {"output": output.detach()}
        if cotangent is not None:
            inputs = {"A": a, "B": b} | ({"x": own_x} if x.is_floating_point() else {})
            gradients = torch.autograd.grad(output, list(inputs.values()), view(cotangent.double()))
            found |= dict(zip(inputs, gradients, strict=True))
        return found

    values, sizes = compute(lambda tensor: tensor), compute(torch.abs)
    return {key: (values[key], sizes[key]) for key in values}


def assert_near(got: Tensor | None, want: Pair, *dtypes: torch.dtype) -> None:
    """Each entry may be off by a few roundings, in the coarsest of `dtypes`, of the terms that it sums."""
    assert got is not None
    value, size = want[0], want[1].clamp_min(1e-30)
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    torch.testing.assert_close(got.detach().double() / size, value / size, atol=4 * eps, rtol=0)


PLAIN_SITES = ("embed", "conv", "attn.q_proj", "attn.out_proj", "mlp.0", "mlp.2", "head")


def plain_model(**options: Any) -> tuple[Plain, Plain, tg.Adapter]:
    """Return a model with every kind of layer, a copy of it with a LoRA, and the adapter."""
    torch.manual_seed(0)
    base = Plain().eval()
    perturb_(list(base.parameters()), 0.1)
    model = deepcopy(base)
    base.requires_grad_(False)  # torch computes in another order, with other roundings, where a weight needs a gradient
    adapter = tg.apply(model, "lora", targets=["@all"], **{"rank": RANK, "alpha": ALPHA, **options})
    perturb_(adapter.parameters(), 0.2)
    return base, model, adapter


TOKENS = torch.arange(22).reshape(2, 11) % 11


def canonical(module: nn.Module) -> Tensor:
    """Return the weight as a matrix (out, in), in float64."""
    weight = module.weight.detach().double()
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight.reshape(len(weight), -1)


def output(module: nn.Module, matrix: Tensor, x: Tensor) -> Tensor:
    """Return what the layer computes with `matrix` (out, in) as its weight, in float64."""
    bias = getattr(module, "bias", None)
    x = x.double() if x.is_floating_point() else x
    return dense(module, as_stored(module, matrix), None if bias is None else bias.detach().double(), x)


def own_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"
