"""How a layer is read, written and applied. This is what lets one method work on every type of layer.

A method sees each weight as a matrix W of shape (out_features, in_features), the *canonical* form. A kind converts to and
from it, and applies a pair of factors A (r, in_features), B (out_features, r) as the layer itself would apply B·A.

torch is imported where it is called: a kind's arithmetic on shapes serves checkpoints that no model was built for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torchgraft import dtypes

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn


Shape = tuple[int, ...]

CHILD = "adapters"
"""The child under which a module keeps its adapters."""
CARRIER = "_torchgraft_carrier"
"""The attribute that marks a class whose modules carry adapters."""


class LowRank(NamedTuple):
    """A low-rank change of a layer: gain·(W + scale·B·A)·x + bias."""

    a: Tensor
    """A (r, in_features)."""
    b: Tensor
    """B (out_features, r)."""
    scale: float = 1.0
    dropout: float = 0.0
    """Probability with which inputs of A are dropped in training."""
    gain: Tensor | None = None
    """Factors of the output features, as `Kind.broadcast` returns them; None for 1."""
    bias: Tensor | None = None
    """The layer's bias, as `Kind.broadcast` returns it. Needed with a gain, because the bias is not multiplied."""
    stored: Tensor | None = None
    """The weight as `Kind.weight_for_product` returned it."""


class Kind(ABC):
    """One type of layer. `name` is what `inspect` shows and files record. Plugins add kinds by the hook `layer_kind`."""

    name: str
    quantized = False
    """Whether the module holds the weight as codes, so that it cannot be written but only replaced."""
    dimensions = 0
    """Of a convolution's kernel; 0 for any other layer."""
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

    def low_rank(
        self,
        module: nn.Module,
        x: Tensor,
        base: Callable[[Tensor], Tensor],
        a: Tensor,
        b: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
        gain: Tensor | None = None,
        bias: Tensor | None = None,
        stored: Tensor | None = None,
    ) -> Tensor:
        """gain·(W + scale·B·A)·x + bias, where `base(x)` is W·x + bias; in the dtype of `base(x)`.

        The update is computed in A's type, and in autocast's under autocast. `gain` and `bias` come as from `broadcast`, and
        `stored` from `weight_for_product`.
        """
        return self.add_low_rank(module, x, base, LowRank(a, b, scale, dropout, gain, bias, stored))

    def add_low_rank(self, module: nn.Module, x: Tensor, base: Callable[[Tensor], Tensor], change: LowRank) -> Tensor:
        """Compute `low_rank` from its arguments as one value. A kind that knows a faster way overrides this method."""
        h = base(x)
        update = self.project_out(module, change.scale * self.project_in(module, x, change.a, change.dropout), change.b)
        return with_gain(h + update, change.gain, change.bias).to(h.dtype)

    def weight_for_product(self, module: nn.Module, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor | None:
        """What `weight_of` gives, if `low_rank` takes it in training for the layer's product with `x` and so saves making it again."""
        return None

    def dropout(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        """The layer's input with entries dropped, in training."""
        return dropped(x, p, module)

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


def dropped(x: Tensor, p: float, module: nn.Module) -> Tensor:
    """`x` with entries dropped with probability `p`, if `module` is in training."""
    from torch.nn import functional as F

    return F.dropout(x, p) if p and module.training else x


def with_gain(h: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """gain·(h - bias) + bias, in a form that is `h` to the last bit where `gain` is 1."""
    import torch

    if gain is None:
        return h
    return h * gain if bias is None else torch.addcmul((1 - gain) * bias, h, gain)


def traced() -> bool:
    """Whether a compiler looks on, or one of torch.func's transforms: what is computed then is not to be written to, nor kept."""
    import torch

    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or bool(torch._C._are_functorch_transforms_active())


def carries_adapters(module: nn.Module) -> bool:
    return hasattr(type(module), CARRIER)


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
    plain = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__ and CARRIER not in cls.__dict__)
    if plain is not base and plain.__dict__["forward"] is not base.forward:
        return f"is a {type(module).__name__}, whose forward is its own and not {base.__name__}'s"
    return ""
