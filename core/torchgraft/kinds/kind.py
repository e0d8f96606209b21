"""A kind defines how a type of layer is read, written and applied, so that one method works on every type of layer.

A method sees each weight as a matrix W of shape (out_features, in_features), the *canonical* form. A kind converts to and
from it, and applies a pair of factors A (r, in_features), B (out_features, r) as the layer itself would apply B·A.

torch is imported inside functions, because a kind's arithmetic on shapes is also used on checkpoints without a model.
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
"""Name of the child module that contains a layer's adapters."""
CARRIER = "_torchgraft_carrier"
"""Name of the attribute that marks classes whose modules carry adapters."""


HOOKED = "_old_forward"
"""Attribute of a module with a hook of accelerate: the forward that the hook calls."""


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
    """One type of layer. `inspect` shows its `name`, and files record it. Plugins add kinds by the hook `layer_kind`."""

    name: str
    quantized = False
    """Whether the module stores the weight as codes. Such a weight cannot be written, only replaced."""
    dimensions = 0
    """Number of dimensions of a convolution's kernel; 0 for any other layer."""
    stored_as = ""
    """Name of the kind that this layer has in a checkpoint, if it differs."""

    @abstractmethod
    def module_class(self) -> type[nn.Module] | None:
        """Return the class whose `forward` this kind reproduces; None if it is not installed."""

    @abstractmethod
    def canonical_shape(self, shape: Shape) -> tuple[int, int]:
        """Return (out_features, in_features) of a weight stored with `shape`."""

    def fits(self, shape: Shape) -> bool:
        """Whether a weight of this kind can be stored with `shape`."""
        return len(shape) == 2

    @abstractmethod
    def to_canonical(self, weight: Tensor) -> Tensor:
        """Return the stored weight as (out_features, in_features). It may be a view."""

    @abstractmethod
    def from_canonical(self, matrix: Tensor, shape: Shape) -> Tensor:
        """Return a canonical matrix in the stored form: the inverse of `to_canonical`."""

    def fan_in(self, shape: Shape) -> int:
        """Return how many inputs reach one output at a time; it sets the scale of a random A."""
        return self.canonical_shape(shape)[1]

    @abstractmethod
    def project_in(self, module: nn.Module, x: Tensor, a: Tensor, dropout: float = 0.0) -> Tensor:
        """Apply A to the layer's input: Linear (…, in) → (…, r). Inputs are dropped with probability `dropout` in training."""

    @abstractmethod
    def project_out(self, module: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        """Apply B to the result of `project_in`: Linear (…, r) → (…, out)."""

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        """Run the layer's own operation with `matrix` (out_features, in_features) as its weight, without bias: Linear (…, in) → (…, out).

        This default uses an identity matrix as B; a kind may override it with a faster way.
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
        """Return gain·(W + scale·B·A)·x + bias, where `base(x)` is W·x + bias, in the dtype of `base(x)`.

        The update is computed in A's type, and in autocast's under autocast. `gain` and `bias` have the shape that `broadcast`
        returns, and `stored` is the result of `weight_for_product`.
        """
        return self._add_low_rank(module, x, base, LowRank(a, b, scale, dropout, gain, bias, stored))

    def _add_low_rank(self, module: nn.Module, x: Tensor, base: Callable[[Tensor], Tensor], change: LowRank) -> Tensor:
        """Compute `low_rank` from its arguments as one value. A kind that knows a faster way overrides this method."""
        h = base(x)
        update = self.project_out(module, change.scale * self.project_in(module, x, change.a, change.dropout), change.b)
        return with_gain(h + update, change.gain, change.bias).to(h.dtype)

    def weight_for_product(self, module: nn.Module, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return `weight_of(module)` if `low_rank` may compute W x from it in training instead of calling `base(x)`; else None."""
        return None

    def dropout(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        """Return the layer's input with entries dropped in training."""
        return dropped(x, p, module)

    def broadcast(self, module: nn.Module, vector: Tensor) -> Tensor:
        """Reshape `vector`, one value for each output feature, so that it broadcasts with the layer's output."""
        return vector

    def unfit(self, module: nn.Module) -> str:
        """Return why this module, though of the right class, cannot be adapted; empty if it can."""
        return ""

    def shape_of(self, module: nn.Module) -> Shape:
        """Return the shape of the weight as a checkpoint stores it."""
        return tuple(module.weight.shape)  # type: ignore[arg-type]

    def dtype_of(self, module: nn.Module) -> dtype:
        """Return the dtype of the weight; for a quantized weight, the dtype that it was quantized from."""
        return module.weight.dtype  # type: ignore[return-value]

    def weight_of(self, module: nn.Module) -> Tensor:
        """Return the weight in the shape and type that a checkpoint stores; a quantized weight is dequantized."""
        return module.weight.detach()  # type: ignore[operator]

    def quantization(self, module: nn.Module) -> dict[str, Any]:
        """Return how the weight is quantized; empty if it is not."""
        return {}

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        """Return small layers of this kind, each with an input of at least two entries, on which `torchgraft.testing` tests methods.

        They should be square and not square, with a bias and without, with values from torch's own generator. The default is none.

        Raises:
            ImportError: the layer's class is not installed.
        """
        return []


def dropped(x: Tensor, p: float, module: nn.Module) -> Tensor:
    """Return `x` with entries dropped with probability `p` if `module` is in training."""
    from torch.nn import functional as F

    return F.dropout(x, p) if p and module.training else x


def with_gain(h: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return gain·(h - bias) + bias, in a form that equals `h` bit for bit where `gain` is 1."""
    import torch

    if gain is None:
        return h
    return h * gain if bias is None else torch.addcmul((1 - gain) * bias, h, gain)


def traced() -> bool:
    """Whether torch.compile, a tracer or a torch.func transform is active: results must then be neither changed in place nor cached."""
    import torch

    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or bool(torch._C._are_functorch_transforms_active())


def carries_adapters(module: nn.Module) -> bool:
    return hasattr(type(module), CARRIER)


def bound_forwards(module: nn.Module) -> list[str]:
    """Return the attributes of the module that are its class's forward: accelerate's hook calls one, and leaves one when it is removed."""
    return [key for key in ("forward", HOOKED) if getattr(module.__dict__.get(key), "__func__", None) is type(module).forward]


def kind_of(module: nn.Module, kinds: tuple[Kind, ...]) -> tuple[Kind | None, str]:
    """Return the kind of `module`; or None, with the reason if its class has a kind but it cannot be adapted."""
    for kind in kinds:
        base = kind.module_class()
        if base is not None and isinstance(module, base):
            reason = _own_ways(module, kind, base) or kind.unfit(module)
            return (None, reason) if reason else (kind, "")
    return None, ""


def _own_ways(module: nn.Module, kind: Kind, base: type[nn.Module]) -> str:
    """Return why an adapter's change would differ from what the layer computes, or would be bypassed silently; empty if it would not."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "has a weight that is computed, not stored (a parametrization?)"
    if not kind.quantized and dtypes.name_of(weight.dtype) not in dtypes.ADAPTABLE:
        return f"has a weight of type {dtypes.name_of(weight.dtype)}, which is quantized"
    if 0 in weight.shape:
        return f"has an empty weight of shape {list(weight.shape)} (sharded by ZeRO-3?)"
    if HOOKED in module.__dict__ and weight.is_meta:
        return "has a weight that accelerate offloaded; attach the adapter before dispatch_model, or load the model without offloading"
    if "forward" in module.__dict__ and not bound_forwards(module):
        return "has a forward that was replaced on the instance, which would bypass the adapter; attach the adapter before it is replaced"
    plain = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__ and CARRIER not in cls.__dict__)
    if plain is not base and plain.__dict__["forward"] is not base.forward:
        return f"is a {type(module).__name__}, whose forward is its own and not {base.__name__}'s"
    return ""
