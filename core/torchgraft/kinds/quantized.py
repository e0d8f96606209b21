"""The quantized linear layers of bitsandbytes as kinds, so that every method works on them.

bitsandbytes takes seconds to import. It is imported to quantize or dequantize, never to test whether a layer is quantized.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from torchgraft import dtypes
from torchgraft.kinds.dense import Linear
from torchgraft.kinds.kind import Kind, Shape

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

REPACKS = "support_avx512bf16_for_cpu"
"""Name of bitsandbytes' attribute that decides whether a layer repacks its weight in an eval forward."""


class Quantized(Linear):
    """A linear layer of bitsandbytes. A method sees its dequantized weight, (out, in), in the type that the layer computes in."""

    quantized = True
    stored_as = "Linear"

    def module_class(self) -> type[nn.Module] | None:
        library = sys.modules.get("bitsandbytes.nn")
        return getattr(library, self.name, None)

    def shape_of(self, module: nn.Module) -> Shape:
        return (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]

    def weight_of(self, module: nn.Module) -> Tensor:
        base = self.module_class()
        if base is not None and isinstance(module, base):
            return self.dequantized(module)
        weight: Tensor = module.weight.detach()  # type: ignore[operator]  # the layer is dense while an adapter is merged into it
        return weight

    @abstractmethod
    def dequantized(self, module: nn.Module) -> Tensor:
        """Return the weight that the layer computes with."""


class Linear4bit(Quantized):
    """bitsandbytes.nn.Linear4bit: NF4 or FP4 codes, two to a byte, with one scale for each block."""

    name = "Linear4bit"
    returns_new = True

    def unfit(self, module: nn.Module) -> str:
        if getattr(module.weight, "quant_state", None) is None and getattr(module, "quant_state", None) is None:
            return "is not quantized yet: bitsandbytes quantizes when the layer is moved to its device, with .to(…)"
        return ""

    def dtype_of(self, module: nn.Module) -> dtype:
        state = _state(module)
        found: dtype = getattr(state, "original_dtype", state.dtype)
        return found

    def dequantized(self, module: nn.Module) -> Tensor:
        return self._dequantize(module)()

    def _dequantize(self, module: nn.Module) -> Callable[[], Tensor]:
        from bitsandbytes import functional as bnb

        packed, state = module.weight.data, _state(module)
        if _is_repacked(state):
            packed, state = _unpacked(packed, state)  # type: ignore[arg-type]
        wide = copy(state)
        wide.dtype = _decoded_type(module)
        return lambda: bnb.dequantize_4bit(packed, wide).reshape(state.shape)  # type: ignore[arg-type]

    def weight_for_product(self, module: nn.Module, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return the weight on a CPU, where bitsandbytes dequantizes for each product. On other devices it may read the codes."""
        from torchgraft.kinds.autograd import autocast

        here = x.device.type == "cpu" and module.training and self._is_alone(x, base) and not autocast(x)
        if not here or _is_repacked(_state(module)) or not x.dtype == module.compute_dtype == _decoded_type(module):
            return None
        return self.dequantized(module)

    def product_with(self, module: nn.Module, rows: Tensor, stored: Tensor) -> Tensor:
        from torchgraft.kinds.autograd import product

        bias: Tensor | None = module.bias  # type: ignore[assignment]
        return product(rows, stored, bias if bias is None else bias.to(rows.dtype), self._dequantize(module))

    def quantization(self, module: nn.Module) -> dict[str, Any]:
        state = _state(module)
        nested = bool(getattr(state, "original_nested", state.nested))
        compute = str(module.compute_dtype or "float32").removeprefix("torch.")
        return {"type": state.quant_type, "block_size": state.blocksize, "double": nested, "compute_dtype": compute}

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        from torchgraft.kinds.quantization import Quantization
        from torchgraft.kinds.quantizing import quantized_linear

        settings = (Quantization(), Quantization("fp4", double=False, compute_dtype="float32"))
        return [(quantized_linear(layer, how), x) for (layer, x), how in zip(_examples(), settings, strict=True)]


class Linear8bitLt(Quantized):
    """bitsandbytes.nn.Linear8bitLt: LLM.int8(), one scale for each row."""

    name = "Linear8bitLt"

    def unfit(self, module: nn.Module) -> str:
        if module.state.has_fp16_weights:  # type: ignore[union-attr]
            return "quantizes in each forward (has_fp16_weights=True) and would train its weight; create it with has_fp16_weights=False"
        if str(module.weight.dtype) != "torch.int8":
            return "is not quantized yet: bitsandbytes quantizes when the layer is moved to its device, with .to(…)"
        return ""

    def dtype_of(self, module: nn.Module) -> dtype:
        import torch

        return torch.float16  # bitsandbytes quantizes from float16, whatever the type of the weight was

    def dequantized(self, module: nn.Module) -> Tensor:
        """Return code · scale / 127 in float32, because float16 would round the values that the layer multiplies with."""
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB  # type: ignore[union-attr]
        return module.weight.data.float() * (scales.float() / 127).unsqueeze(1)  # type: ignore[operator, union-attr]

    def quantization(self, module: nn.Module) -> dict[str, Any]:
        return {"type": "int8"}

    def examples(self) -> list[tuple[nn.Module, Tensor]]:
        from bitsandbytes import nn as bnb

        found: list[tuple[nn.Module, Tensor]] = []
        for linear, x in _examples():
            layer: Any = bnb.Linear8bitLt(  # type: ignore[attr-defined]
                linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
            )
            layer.weight = bnb.Int8Params(linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)  # type: ignore[attr-defined]
            layer.bias = linear.half().bias
            found.append((layer.to("cpu"), x.half()))
        return found


KINDS: tuple[Kind, ...] = (Linear4bit(), Linear8bitLt())


def stop_repacking(model: nn.Module) -> list[nn.Module]:
    """Stop 4-bit layers from repacking their weight in eval, which rounds its scales and has no backward. Return those layers."""
    found = [module for module in model.modules() if module.__dict__.get(REPACKS)]
    for module in found:
        setattr(module, REPACKS, False)
    return found


def let_repack(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        setattr(module, REPACKS, True)


def _examples() -> list[tuple[nn.Linear, Tensor]]:
    import torch
    from torch import nn

    layers = (nn.Linear(64, 32), nn.Linear(64, 64, bias=False))
    return [(layer, torch.randn(5, layer.in_features)) for layer in layers]


def _state(module: nn.Module) -> Any:
    """Return the quantization state: of the weight, or of the layer where FSDP dropped it from the weight."""
    return getattr(module.weight, "quant_state", None) or module.quant_state


def _decoded_type(module: nn.Module) -> dtype:
    """Return the type that the layer dequantizes to: it does not round to the type that it was quantized from."""
    import torch

    return torch.promote_types(_state(module).dtype, module.compute_dtype or torch.float32)  # type: ignore[arg-type]


def _is_repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _unpacked(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return codes and scales in the usual order, after bitsandbytes repacked them for AVX512-BF16 in an eval forward.

    bitsandbytes' own inverse quantizes the scales again, or leaves them transposed, so only its codes are used. Repacking
    rounded the scales to bfloat16; the layer now computes with these rounded scales.
    """
    from bitsandbytes import functional as bnb

    plain = copy(state)
    plain.original_nested = False
    codes, plain = bnb._convert_weight_packed_for_cpu_inverse(packed, plain)
    plain.absmax = state.absmax.t().reshape(-1).float()
    return codes, plain


def round_trip(weight: Tensor, how: Mapping[str, Any]) -> Tensor:
    """Return `weight` (out, in) as a layer computes with it after quantization as `how` records: a new tensor.

    Args:
        how: type, block_size, double and compute_dtype, and `from`, the dtype that was quantized.
    """
    from torchgraft.kinds.quantization import Quantization
    from torchgraft.kinds.quantizing import blank_linear, set_weight

    settings, dtype = Quantization.recorded(how)
    out_features, in_features = weight.shape
    layer = blank_linear(in_features, out_features, False, settings)
    set_weight(layer, weight.to(dtypes.torch_dtype(dtype)), settings)
    return Linear4bit().dequantized(layer)
