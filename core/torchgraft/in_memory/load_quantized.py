"""Load a transformers model with some of its layers in 4 bits, one tensor at a time.

transformers builds the model, finds the tensors and their names, and ties weights; this module determines which layers
are quantized, and how. The 16-bit weights are never all in memory at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchgraft.checkpoint import fingerprint
from torchgraft.checkpoint.hub import locate
from torchgraft.disk import read_json
from torchgraft.errors import AttachError, FileFormatError
from torchgraft.kinds.quantization import Quantization
from torchgraft.kinds.quantizing import blank_linear, set_weight
from torchgraft.layers.layer import Layer
from torchgraft.layers.plan import plan

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

NAME = "torchgraft_4bit"
"""Name of torchgraft's quantizer in transformers' registry."""


def load_quantized(
    source: str | Path,
    targets: str | Iterable[str] | None = None,
    layers: str | int | Iterable[int] | None = None,
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    compute_dtype: str = "bfloat16",
    model_class: Any = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a transformers model; the layers in `targets` (default: @linear) are quantized as they are read.

    `tg.apply(model, "qlora", targets)` then attaches adapters to it; every other method works as well.

    Process-wide effects: a quantizer "torchgraft_4bit" is added to transformers' registry and stays there, and glibc's `malloc_trim`
    is called after each quantized weight.

    Args:
        source: a checkpoint directory or a hub id.
        quant_type: "nf4" or "fp4".
        double_quant: quantize the blocks' scales, too: 4.127 bits per weight instead of 4.5.
        block_size: number of weights that share a scale.
        compute_dtype: dtype to which the weights are dequantized in forward.
        model_class: a class of transformers, AutoModelForSequenceClassification; by default the one that config.json names.
        device: device of the model; by default the CPU.
        options: for `from_pretrained`; `dtype` is the dtype of the layers that are not quantized.

    Raises:
        FileFormatError: there is no such checkpoint, its config.json names no model class, or it is quantized already.
        ConfigError: an option has a value that bitsandbytes does not support.
        SelectionError: a pattern is malformed or matches nothing.
        AttachError: a selected layer cannot be quantized.
    """
    try:
        import transformers
    except ImportError:
        raise FileFormatError("tg.load_quantized builds the model with transformers; install torchgraft[hf]") from None
    how = Quantization(quant_type, double_quant, block_size, compute_dtype)  # type: ignore[arg-type]
    root = locate(source)
    _check_config(root)
    cls = model_class or _class_of(root)
    _register()
    config = _config(transformers.BitsAndBytesConfig, how, targets, layers)
    model: PreTrainedModel = cls.from_pretrained(
        str(root), quantization_config=config, device_map={"": device or "cpu"}, **{"dtype": "auto", **options}
    )
    _quantize_the_rest(model, how)
    quantized = [name for name, module in model.named_modules() if fingerprint.SOURCE in module.__dict__]
    _present_as_bitsandbytes(model, how, quantized)
    return model


def _check_config(root: Path) -> None:
    if not (root / "config.json").is_file():
        raise FileFormatError(
            f"{root}: no config.json that names the model's class; build the model yourself, then tg.apply(model, 'qlora')"
        )
    if read_json(root / "config.json").get("quantization_config"):
        raise FileFormatError(f"{root}: its weights are quantized already; load it with transformers and put adapters on that")


def _quantize_the_rest(model: PreTrainedModel, how: Quantization) -> None:
    """Quantize the layers that are not in the files, such as a new head, which transformers has initialized."""
    for module in model.modules():
        if getattr(module, "quant_state", module) is None:
            set_weight(module, module.weight.data, how)


def _class_of(root: Path) -> Any:
    import transformers

    architectures = getattr(transformers.AutoConfig.from_pretrained(str(root)), "architectures", None) or ["AutoModel"]
    cls = getattr(transformers, architectures[0], None)
    if cls is None:
        raise FileFormatError(f"{root}: config.json names {architectures[0]!r}, which transformers does not have; pass model_class=…")
    return cls


def _config(base: type[BitsAndBytesConfig], how: Quantization, targets: Any, layers: Any) -> Any:
    config: Any = base(
        load_in_4bit=True,
        bnb_4bit_quant_type=how.type,
        bnb_4bit_use_double_quant=how.double,
        bnb_4bit_compute_dtype=how.compute_dtype,
    )
    config.quant_method = NAME
    config.torchgraft = (how, targets, layers)
    return config


def _register() -> None:
    """Add torchgraft's quantizer to transformers' registry, once."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    if NAME in AUTO_QUANTIZER_MAPPING:
        return

    class Quantize(ConversionOps):  # type: ignore[misc]
        """Quantizes one tensor of the checkpoint into its layer."""

        def __init__(self, how: Quantization) -> None:
            self.how = how

        def convert(self, input_dict: dict[str, Any], *_: Any, model: Any = None, **__: Any) -> Any:
            result = {}
            for name, value in input_dict.items():
                layer = model.get_submodule(name.rpartition(".")[0])
                set_weight(layer, value[0] if isinstance(value, list) else value, self.how)
                layer._is_hf_initialized = True
                result[name] = layer.weight
                _release()
            return result

    @register_quantizer(NAME)
    class Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
        """transformers' quantizer for bitsandbytes, with torchgraft's selection of layers and its quantization."""

        quantization_config: Any

        def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any = None, **_: Any) -> None:
            how, targets, layers = self.quantization_config.torchgraft
            tied = model.all_tied_weights_keys
            for layer in plan(model, targets, layers).sites:
                old: Any = model.get_submodule(layer.name)
                if reason := _unfit(layer, {**tied, **{value: key for key, value in tied.items()}}):
                    raise AttachError(f"{layer.name}: {reason}; exclude it: '!{layer.name}'")
                new = blank_linear(old.in_features, old.out_features, old.bias is not None, how)
                if new.bias is not None:
                    new.bias = nn.Parameter(new.bias.to(old.bias.dtype), requires_grad=False)
                model.set_submodule(layer.name, new)

        def get_quantize_ops(self) -> Quantize:
            return Quantize(self.quantization_config.torchgraft[0])


def _unfit(layer: Layer, tied: Mapping[str, str]) -> str:
    """Return why a layer cannot be quantized; empty if it can."""
    if layer.kind != "Linear":
        return f"only a Linear can be quantized, and its kind is {layer.kind}"
    if layer.dtype == "float64":
        return "bitsandbytes does not quantize float64 (dtype=torch.bfloat16 converts it)"
    other = tied.get(f"{layer.name}.weight", "")
    return f"its weight is shared with {other}" if other else ""


def _release() -> None:
    """Return freed memory to the system: glibc would keep the fragments that quantizing leaves, several times the size of the model."""
    if hasattr(ctypes.pythonapi, "malloc_trim"):
        ctypes.pythonapi.malloc_trim(0)


def _present_as_bitsandbytes(model: PreTrainedModel, how: Quantization, quantized: list[str]) -> None:
    """Set the config that transformers itself would set, so that it can save and load the model."""
    import transformers

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=how.type,
        bnb_4bit_use_double_quant=how.double,
        bnb_4bit_compute_dtype=how.compute_dtype,
        llm_int8_skip_modules=sorted(set(linear) - set(quantized)),
    )
    model.config.quantization_config = config
    model.hf_quantizer.quantization_config = config
