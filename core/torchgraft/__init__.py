"""torchgraft: adapter methods as plugins, and the engine that attaches, trains, merges and exactly unmerges them.

The names of `__all__` are public, and nothing else is. They are loaded when first used, so that `import torchgraft` does not
import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchgraft.version import __version__ as __version__

if TYPE_CHECKING:
    from torchgraft import testing as testing
    from torchgraft.adapter_files.peft_lora import LowRankPeft as LowRankPeft
    from torchgraft.errors import (
        AttachError as AttachError,
        ConfigError as ConfigError,
        ConformanceError as ConformanceError,
        FileFormatError as FileFormatError,
        MergeError as MergeError,
        PairingError as PairingError,
        PluginError as PluginError,
        SelectionError as SelectionError,
        TorchgraftError as TorchgraftError,
        TorchgraftWarning as TorchgraftWarning,
    )
    from torchgraft.in_memory.adapter import Adapter as Adapter, Count as Count, activate as activate, adapters as adapters
    from torchgraft.in_memory.apply import apply as apply
    from torchgraft.in_memory.load import load as load
    from torchgraft.in_memory.load_quantized import load_quantized as load_quantized
    from torchgraft.in_memory.param_groups import scaled_param_groups as scaled_param_groups
    from torchgraft.in_memory.parts import SitePart as SitePart
    from torchgraft.in_memory.per_sample import per_sample as per_sample
    from torchgraft.kinds.kind import Kind as Kind
    from torchgraft.kinds.quantization import Quantization as Quantization
    from torchgraft.kinds.quantizing import quantized_linear as quantized_linear
    from torchgraft.layers.plan import Plan as Plan, plan as plan
    from torchgraft.method.config import Config as Config, LowRankConfig as LowRankConfig
    from torchgraft.method.lowrank import factor_shapes as factor_shapes, factors as factors, init_factors as init_factors
    from torchgraft.method.method import Method as Method, PeftFormat as PeftFormat
    from torchgraft.method.resize import Resize as Resize
    from torchgraft.method.site import Site as Site, seed_of as seed_of
    from torchgraft.on_files.export import ExportReport as ExportReport, export_adapter as export_adapter
    from torchgraft.on_files.merge import MergeReport as MergeReport, merge_checkpoint as merge_checkpoint
    from torchgraft.on_files.unmerge import unmerge_checkpoint as unmerge_checkpoint
    from torchgraft.plugin.hookspecs import hookimpl as hookimpl
    from torchgraft.plugin.registry import Registry as Registry, registry as registry

_HOMES = {
    "adapter_files.peft_lora": "LowRankPeft",
    "errors": (
        "AttachError ConfigError ConformanceError FileFormatError MergeError PairingError PluginError SelectionError TorchgraftError "
        "TorchgraftWarning"
    ),
    "in_memory.adapter": "Adapter Count activate adapters",
    "in_memory.apply": "apply",
    "in_memory.load": "load",
    "in_memory.load_quantized": "load_quantized",
    "in_memory.param_groups": "scaled_param_groups",
    "in_memory.parts": "SitePart",
    "in_memory.per_sample": "per_sample",
    "kinds.kind": "Kind",
    "kinds.quantization": "Quantization",
    "kinds.quantizing": "quantized_linear",
    "layers.plan": "Plan plan",
    "method.config": "Config LowRankConfig",
    "method.lowrank": "factor_shapes factors init_factors",
    "method.method": "Method PeftFormat",
    "method.resize": "Resize",
    "method.site": "Site seed_of",
    "on_files.export": "ExportReport export_adapter",
    "on_files.merge": "MergeReport merge_checkpoint",
    "on_files.unmerge": "unmerge_checkpoint",
    "plugin.hookspecs": "hookimpl",
    "plugin.registry": "Registry registry",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

_MODULES = ("testing",)

__all__ = [
    "__version__",
    *_HOME_OF,
    *_MODULES,
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"torchgraft.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'torchgraft' has no attribute {name!r}")
    value = getattr(import_module(f"torchgraft.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
