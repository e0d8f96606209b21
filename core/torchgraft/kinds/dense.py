"""The kinds of torch's own layers, and of Conv1D of transformers."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from torchgraft.kinds.kind import Kind, LowRank, Shape, dropped, traced, with_gain

if TYPE_CHECKING:
    from torch import Tensor, nn


class Linear(Kind):
    """nn.Linear: weight (out, in)."""

    name = "Linear"

    @property
    def returns_new(self) -> bool:
        """Whether the layer's own forward returns a tensor that nothing else references and autograd allows to change in place.

        A kind that derives from this one declares it itself, because its layers may store what they return.
        """
        return type(self) is Linear

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

        return F.linear(dropped(x.to(a.dtype), dropout, module), a)

    def project_out(self, module: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        from torch.nn import functional as F

        return F.linear(h, b)

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        return self.project_in(module, x, matrix)

    def _add_low_rank(self, module: nn.Module, x: Tensor, base: Callable[[Tensor], Tensor], change: LowRank) -> Tensor:
        """Add the update to the layer's output by one product where possible, so that no tensor (…, out) is created for it."""
        from torchgraft.kinds.autograd import autocast, is_wider

        if x.is_nested:
            return super()._add_low_rank(module, x, base, change)
        in_place, rows = self._is_alone(x, base), _rows(x)
        if not in_place:
            h = _rows(base(x))
        elif change.stored is None:
            h = base(rows)
        else:
            h = self.product_with(module, rows, change.stored)
        if rows.dtype == h.dtype and is_wider(change.a, h) and not traced() and not autocast(h):
            y = _wide_sum(h, dropped(rows, change.dropout, module), change)
        else:
            y = _sum(h, self.project_in(module, rows, change.a, change.dropout), change, in_place)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def product_with(self, module: nn.Module, rows: Tensor, stored: Tensor) -> Tensor:
        """Return the layer's own output for `rows`, computed with the result of `weight_for_product`."""
        raise NotImplementedError(f"{self.name} provides no weight for its product")

    def _is_alone(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> bool:
        """Whether the update may be added in place: base(x) returns a new tensor, and flattening `x` to rows keeps its bits.

        A view of the output is not written to, because autograd would copy it twice. torch sums in another order where `x` is
        strided or has more dimensions.
        """
        plain = x.dim() in (2, 3) and not x.is_nested and x.is_contiguous()
        return plain and self.returns_new and not traced() and _is_own_forward(base, self.module_class())

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        import torch
        from torch import nn

        layers = (nn.Linear(12, 20), nn.Linear(20, 12, bias=False), nn.Linear(16, 16, bias=False), nn.Linear(16, 16))
        shapes = ((5,), (2, 3), (5,), (2, 3))  # of the dimensions before the features: in a transformer, batch and sequence
        return [(layer, torch.randn(*shape, layer.in_features)) for layer, shape in zip(layers, shapes, strict=True)]


class Transposed(Kind):
    """A kind whose weight is stored (in, out)."""

    def canonical_shape(self, shape: Shape) -> tuple[int, int]:
        return (shape[1], shape[0])

    def to_canonical(self, weight: Tensor) -> Tensor:
        return weight.t()

    def from_canonical(self, matrix: Tensor, shape: Shape) -> Tensor:
        return matrix.t()


class Conv1D(Transposed, Linear):
    """transformers.pytorch_utils.Conv1D, a linear layer whose weight is stored (in, out): used in GPT-2."""

    name = "Conv1D"

    def module_class(self) -> type[nn.Module] | None:
        import sys

        # If transformers is not loaded, no such module exists; loading it would take seconds.
        library = sys.modules.get("transformers.pytorch_utils")
        return getattr(library, "Conv1D", None)

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        import torch
        from transformers.pytorch_utils import Conv1D as Layer

        found: list[tuple[nn.Module, Tensor]] = []
        for out, width in ((20, 12), (16, 16)):
            layer = Layer(out, width)
            torch.nn.init.normal_(layer.weight, std=0.2)
            torch.nn.init.normal_(layer.bias)  # not zero, so that a bias that is forgotten shows
            found.append((layer, torch.randn(5, width)))
        return found


class Embedding(Transposed):
    """nn.Embedding: weight (V, d). As a matrix it maps a one-hot vector of length V to d values, so its canonical form is (d, V)."""

    name = "Embedding"

    def module_class(self) -> type[nn.Module]:
        from torch import nn

        return nn.Embedding

    def fan_in(self, shape: Shape) -> int:
        return 1  # a one-hot input reaches each output through one entry

    def dropout(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        return x

    def project_in(self, module: nn.Module, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        """Look up columns of A. Indices cannot be dropped, so dropout is applied to those columns."""
        from torch.nn import functional as F

        columns = F.embedding(x, a.t(), module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)  # type: ignore[arg-type]
        return dropped(columns, dropout, module)

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
    """nn.Conv1d, Conv2d and Conv3d with any stride, padding (mode), dilation and groups.

    The weight is (out, in/groups, k…); its canonical form is (out, in/groups·∏k). In a grouped layer, every group applies the same
    A to its own inputs, and its own rows of B. So B·A has the layer's own shape and merges like that of any other layer.
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
        """Run the layer's own convolution with A's rows as filters, once per group: (N, in, …) → (N, groups·r, …)."""
        filters = a.reshape(len(a), *module.weight.shape[1:])  # type: ignore[index]
        filters = filters.repeat(module.groups, *(1,) * (filters.dim() - 1))  # type: ignore[call-overload]
        inputs = dropped(x.to(a.dtype), dropout, module)
        out: Tensor = module._conv_forward(inputs, filters, None)  # type: ignore[operator]  # has every padding mode
        return out

    def project_out(self, module: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        """Run a convolution of kernel size 1: (N, groups·r, …) → (N, out, …)."""
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


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _wide_sum(h: Tensor, rows: Tensor, change: LowRank) -> Tensor:
    """Return the changed output where A and B have a wider type than `h`."""
    from torchgraft.kinds.autograd import wide_low_rank

    gain, bias = change.gain, change.bias
    shift = None if gain is None or bias is None else (1 - gain) * bias
    return wide_low_rank(h, rows, change.a, change.b, change.scale, gain, shift)


def _sum(h: Tensor, u: Tensor, change: LowRank, in_place: bool) -> Tensor:
    """Return the changed output, from u = A·x. With `in_place`, `h` may be written to."""
    if u.dtype == h.dtype:
        # Under autocast u is of h's type, and B is not; autocast does not apply to addmm_ and addmm, and would narrow B.
        add = h.addmm_ if in_place else h.addmm
        y = add(u, change.b.to(h.dtype).t(), alpha=change.scale)
    else:
        from torch.nn import functional as F

        y = h + F.linear(change.scale * u, change.b)
    return with_gain(y, change.gain, change.bias).to(h.dtype)


def _is_own_forward(base: Callable[[Tensor], Tensor], cls: type[nn.Module] | None) -> bool:
    """Whether `base` is the plain forward of a layer of class `cls`, with no other adapter in between."""
    return cls is not None and getattr(base, "__func__", None) is cls.forward


KINDS: tuple[Kind, ...] = (Linear(), Conv1D(), Embedding(), ConvNd(1), ConvNd(2), ConvNd(3))
