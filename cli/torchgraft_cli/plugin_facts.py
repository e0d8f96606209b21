"""What a plugin provides and what a method can do, as `adapt plugins` says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchgraft.method_hooks import MethodHooks

PROVIDED = {"adapter_method": "a method", "layer_kind": "a kind of layer", "register_commands": "commands of adapt"}


def in_words(provides: Sequence[str]) -> str:
    """What the hooks of a plugin come to."""
    found = [words for hook, words in PROVIDED.items() if hook in provides]
    watched = [hook for hook in provides if hook.startswith("adapter_")]
    if watched and "adapter_method" not in provides:
        found.append(f"an observer of {', '.join(watched)}")
    return ", ".join(found) or "nothing"


def capabilities(hooks: MethodHooks) -> dict[str, bool]:
    """What the method declares, or shows by its hooks."""
    method = hooks.method
    return {
        "additive": method.additive,
        "merges_rows": hooks.merges_rows,
        "merges_bias": hooks.merges_bias,
        "to_lora": hooks.has("adapter_to_lora"),
        "peft": method.peft is not None,
    }


def capabilities_in_words(hooks: MethodHooks) -> dict[str, str]:
    can = capabilities(hooks)
    order = "in any order, with factors" if can["additive"] else "in the order in which adapters were attached"
    parts = [
        order,
        "by blocks of rows" if can["merges_rows"] else "with whole weights in memory",
        *(["with the bias"] * can["merges_bias"]),
    ]
    forms = [form for form, there in (("PEFT's format", can["peft"]), ("a plain LoRA", can["to_lora"])) if there]
    return {"merges": ", ".join(parts), "exports to": " and ".join(forms) or "torchgraft's own format alone"}
