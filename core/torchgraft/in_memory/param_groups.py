"""Build parameter groups with a separate learning rate for each role of a tensor."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torchgraft.method.method import Role

if TYPE_CHECKING:
    from torchgraft.in_memory.adapter import Adapter


def scaled_param_groups(adapter: Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups with the rates of LoRA+ (Hayou et al. 2024, arXiv 2402.12354): μ_A = α_A·μ₀ and μ_B = α_B·μ₀.

    | parameter                     | learning rate           | weight decay   |
    |-------------------------------|-------------------------|----------------|
    | A                             | lr · lr_scale_a         | as given       |
    | B                             | lr · lr_scale_b         | as given       |
    | A and B of an Embedding       | lr · lr_scale_embedding | as given       |
    | magnitude                     | lr                      | none: it would shrink the frozen weight itself |
    | others, fully trained modules | lr                      | as given       |

    The method declares the role of each of its tensors in `Method.roles`.
    """
    groups: dict[tuple[float, float], list[Any]] = defaultdict(list)
    roles = adapter.hooks.method.roles
    for part in adapter.parts.values():
        for name, parameter in part.named_parameters():
            role = roles.get(name)
            decay = 0.0 if role == "magnitude" else weight_decay
            groups[lr * _lr_scale(part.config, role, part.site.kind.name), decay].append(parameter)
    fully_trained = [parameter for copy in adapter.copies.values() for parameter in copy.module.parameters()]
    if fully_trained:
        groups[lr, weight_decay] += fully_trained
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _lr_scale(config: Any, role: Role | None, kind: str) -> float:
    if role not in ("A", "B"):
        return 1.0
    if kind == "Embedding":
        return float(config.lr_scale_embedding)
    return float(config.lr_scale_a if role == "A" else config.lr_scale_b)
