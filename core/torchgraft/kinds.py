"""How a layer is read, written and applied. This is what lets one method work on every type of layer.

A method sees each weight as a matrix W of shape (out_features, in_features), the *canonical* form. A kind converts to and
from it, and applies a pair of factors A (r, in_features), B (out_features, r) as the layer itself would apply B·A.

torch is imported where it is called: a kind's arithmetic on shapes serves checkpoints that no model was built for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING, Any

from torchgraft import dtypes

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

Shape = tuple[int, ...]


class Kind(ABC):
    """One type of layer. `name` is what `inspect` shows and files record. Plugins add kinds by the hook `layer_kind`."""

    name: str
    quantized = False
    """Whether the module holds the weight as codes, so that it cannot be written but only replaced."""
    stored_as = ""
    """The kind that this layer has in a checkpoint, where that is another."""

    @abstractmethod
    def module_class(self) -> type[nn.Module] | None:
        """The class whose `forward` this kind knows; None if it is not installed."""

    @abstractmethod
    def canonical_shape(self, shape: Shape) -> tuple[int, int]:
        """(out_features, in_features) of a weight stored with `shape`."""

    def fits(self, shape: Shape) -> bool:
        """Whether a weight of this kind can be stored with `shape`."""
        return len(shape) == 2

    @abstractmethod
    def to_canonical(self, weight: Tensor) -> Tensor:
        """The stored weight as (out_features, in_features). May be a view."""

    @abstractmethod
    def from_canonical(self, matrix: Tensor, shape: Shape) -> Tensor:
        """The inverse of `to_canonical`."""

    def fan_in(self, shape: Shape) -> int:
        """How many inputs reach one output at a time; it sets the scale of a random A."""
        return self.canonical_shape(shape)[1]

    @abstractmethod
    def project_in(self, module: nn.Module, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        """A applied to the layer's input: Linear (…, in) → (…, r). Inputs are dropped with probability `dropout` in training."""

    @abstractmethod
    def project_out(self, module: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        """B applied to what `project_in` returned: Linear (…, r) → (…, out)."""

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        """The layer's own operation with `matrix` (out_features, in_features) for its weight, and no bias: Linear (…, in) → (…, out).

        By way of an identity for B; a kind that knows a shorter way says so.
        """
        import torch

        return self.project_out(
            module, self.project_in(module, x, matrix), torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        )

    def dropout(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        """The layer's input with entries dropped, in training."""
        return _dropout(x, p, module)

    def broadcast(self, module: nn.Module, vector: Tensor) -> Tensor:
        """One number for each output feature, (out_features,), shaped so that it goes along with the layer's output."""
        return vector

    def unfit(self, module: nn.Module) -> str:
        """Why this module, though of the right class, cannot be adapted; empty if it can."""
        return ""

    def shape_of(self, module: nn.Module) -> Shape:
        """Of the weight, as a checkpoint stores it."""
        return tuple(module.weight.shape)  # type: ignore[arg-type]

    def dtype_of(self, module: nn.Module) -> dtype:
        """Of the weight; of a quantised one, the type that it was quantised from."""
        return module.weight.dtype  # type: ignore[return-value]

    def weight_of(self, module: nn.Module) -> Tensor:
        """The weight, in the shape and type that a checkpoint stores; a quantised one is dequantised."""
        return module.weight.detach()  # type: ignore[operator]

    def quantization(self, module: nn.Module) -> dict[str, Any]:
        """How the weight is quantised; empty if it is not."""
        return {}

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        """Small layers of this kind, each with an input of at least two entries: what `torchgraft.testing` tries methods on.

        Square ones and not, with a bias and without, numbers from torch's own generator. Empty: the kind gives none.

        Raises:
            ImportError: the layer's class is not installed.
        """
        return []


class Linear(Kind):
    """nn.Linear: weight (out, in)."""

    name = "Linear"

    def module_class(self) -> type[nn.Module] | None:
        from torch import nn

        return nn.Linear

    def canonical_shape(self, shape: Shape) -> tuple[int, int]:
        return (shape[0], shape[1])

    def to_canonical(self, weight: Tensor) -> Tensor:
        return weight

    def from_canonical(self, matrix: Tensor, shape: Shape) -> Tensor:
        return matrix

    def project_in(self, module: nn.Module, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        from torch.nn import functional as F

        return F.linear(_dropout(x.to(a.dtype), dropout, module), a)

    def project_out(self, module: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        from torch.nn import functional as F

        return F.linear(h, b)

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        return self.project_in(module, x, matrix)

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        import torch
        from torch import nn

        layers = (nn.Linear(12, 20), nn.Linear(20, 12, bias=False), nn.Linear(16, 16, bias=False), nn.Linear(16, 16))
        return [(layer, torch.randn(5, layer.in_features)) for layer in layers]


class Conv1D(Linear):
    """transformers.pytorch_utils.Conv1D, a linear layer whose weight is stored (in, out): GPT-2 and its kin."""

    name = "Conv1D"

    def module_class(self) -> type[nn.Module] | None:
        import sys

        # Without transformers loaded there can be no such module, and loading it takes seconds.
        library = sys.modules.get("transformers.pytorch_utils")
        return getattr(library, "Conv1D", None)

    def canonical_shape(self, shape: Shape) -> tuple[int, int]:
        return (shape[1], shape[0])

    def to_canonical(self, weight: Tensor) -> Tensor:
        return weight.t()

    def from_canonical(self, matrix: Tensor, shape: Shape) -> Tensor:
        return matrix.t()

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        import torch
        from transformers.pytorch_utils import Conv1D as Layer

        found: list[tuple[nn.Module, Tensor]] = []
        for out, width in ((20, 12), (16, 16)):
            layer = Layer(out, width)  # type: ignore[no-untyped-call]
            torch.nn.init.normal_(layer.weight, std=0.2)
            torch.nn.init.normal_(layer.bias)  # it would be zero, and a bias that is forgotten would not show
            found.append((layer, torch.randn(5, width)))
        return found


class Embedding(Kind):
    """nn.Embedding: weight (V, d). As a matrix it maps a one-hot vector of V to d, so its canonical form is (d, V)."""

    name = "Embedding"

    def module_class(self) -> type[nn.Module]:
        from torch import nn

        return nn.Embedding

    def canonical_shape(self, shape: Shape) -> tuple[int, int]:
        return (shape[1], shape[0])

    def to_canonical(self, weight: Tensor) -> Tensor:
        return weight.t()

    def from_canonical(self, matrix: Tensor, shape: Shape) -> Tensor:
        return matrix.t()

    def fan_in(self, shape: Shape) -> int:
        return 1  # a one-hot input reaches each output through one entry

    def dropout(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        return x

    def project_in(self, module: nn.Module, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        """Looks up columns of A. Indices cannot be dropped, so dropout falls on the columns that were looked up."""
        from torch.nn import functional as F

        columns = F.embedding(x, a.t(), module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)  # type: ignore[arg-type]
        return _dropout(columns, dropout, module)

    def project_out(self, module: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        from torch.nn import functional as F

        return F.linear(h, b)

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        return self.project_in(module, x, matrix)

    def unfit(self, module: nn.Module) -> str:
        if module.max_norm is not None:
            return "has max_norm, which rewrites its weight in every forward"
        return ""

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        import torch
        from torch import nn

        layers = (nn.Embedding(11, 14), nn.Embedding(16, 16, padding_idx=0))
        return [(layer, torch.randint(1, layer.num_embeddings, (5, 3))) for layer in layers]


class ConvNd(Kind):
    """nn.Conv1d, 2d, 3d with any stride, padding (mode), dilation and groups.

    Weight (out, in/groups, k…); canonical (out, in/groups·∏k). In a grouped layer every group applies the same A to its
    own inputs and its own rows of B, so B·A has the layer's own shape and merges like any other.
    """

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.name = f"Conv{dimensions}d"

    def module_class(self) -> type[nn.Module]:
        from torch import nn

        conv: type[nn.Module] = getattr(nn, self.name)
        return conv

    def canonical_shape(self, shape: Shape) -> tuple[int, int]:
        return (shape[0], prod(shape[1:]))

    def fits(self, shape: Shape) -> bool:
        return len(shape) == self.dimensions + 2

    def to_canonical(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_canonical(self, matrix: Tensor, shape: Shape) -> Tensor:
        return matrix.reshape(shape)

    def broadcast(self, module: nn.Module, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1,) * self.dimensions)

    def project_in(self, module: nn.Module, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        """(N, in, …) → (N, groups·r, …), by the layer's own convolution with A's rows as filters, once per group."""
        filters = a.reshape(len(a), *module.weight.shape[1:])  # type: ignore[index]
        filters = filters.repeat(module.groups, *(1,) * (filters.dim() - 1))  # type: ignore[call-overload]
        dropped = _dropout(x.to(a.dtype), dropout, module)
        out: Tensor = module._conv_forward(dropped, filters, None)  # type: ignore[operator]  # has every padding mode
        return out

    def project_out(self, module: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        """(N, groups·r, …) → (N, out, …), by a convolution of kernel size 1."""
        from torch.nn import functional as F

        convolution = getattr(F, f"conv{self.dimensions}d")
        out: Tensor = convolution(h, b.reshape(*b.shape, *(1,) * self.dimensions), groups=module.groups)
        return out

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        out: Tensor = module._conv_forward(x.to(matrix.dtype), matrix.reshape(module.weight.shape), None)  # type: ignore[operator, arg-type]
        return out

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        import torch

        make: Any = self.module_class()
        layers = [
            make(4, 10, 3, stride=2, padding=1),
            make(8, 8, 3, padding=2, dilation=2, groups=2, bias=False),
            make(8, 8, 1, padding=1, padding_mode="circular"),
        ]
        return [(layer, torch.randn(3, layer.in_channels, *(6, 5, 4)[: self.dimensions])) for layer in layers]


BUILTIN: tuple[Kind, ...] = (Linear(), Conv1D(), Embedding(), ConvNd(1), ConvNd(2), ConvNd(3))


def _dropout(x: Tensor, p: float, module: nn.Module) -> Tensor:
    from torch.nn import functional as F

    return F.dropout(x, p) if p and module.training else x


def kind_of(module: nn.Module, kinds: tuple[Kind, ...]) -> tuple[Kind | None, str]:
    """The kind of `module`, or None and, where it looks like one that could be adapted, why not."""
    for kind in kinds:
        base = kind.module_class()
        if base is not None and isinstance(module, base):
            reason = _own_ways(module, kind, base) or kind.unfit(module)
            return (None, reason) if reason else (kind, "")
    return None, ""


def _own_ways(module: nn.Module, kind: Kind, base: type[nn.Module]) -> str:
    """What would make an adapter's change differ from what the layer computes, or be passed over in silence."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "has a weight that is computed, not stored (a parametrization?)"
    if not kind.quantized and dtypes.name_of(weight.dtype) not in dtypes.ADAPTABLE:
        return f"has a weight of type {dtypes.name_of(weight.dtype)}, which is quantized"
    if "forward" in module.__dict__:
        return "has a forward that was replaced on the instance (by accelerate's hooks?), which would pass over the adapter"
    plain = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__ and not cls.__dict__.get("_torchgraft", False))
    if plain is not base and plain.__dict__["forward"] is not base.forward:
        return f"is a {type(module).__name__}, whose forward is its own and not {base.__name__}'s"
    return ""
