"""Notice that a layer that carries an adapter is no longer in its model: resized, replaced, or cut off."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from torchgraft.errors import AttachError
from torchgraft.in_memory.parts import named_parts
from torchgraft.kinds.kind import CHILD

Step = tuple[nn.Module, str, nn.Module]
"""(parent, name, child) on the way from the model to a part of an adapter."""


def steps_to_parts(model: nn.Module, adapter: str, sites: Iterable[str]) -> tuple[Step, ...]:
    """Return every step on the way to the adapter's parts, once; nothing if a wrapper hides one.

    Looking up each site by its name at every forward would take milliseconds, and comparing these steps takes microseconds.
    """
    steps: dict[tuple[int, str], Step] = {}
    for site in sites:
        module = model
        for key in (*(site.split(".") if site else ()), CHILD, adapter):
            child = module._modules.get(key)
            if child is None:
                return ()
            steps[id(module), key] = module, key, child
            module = child
    return tuple(steps.values())


def are_unchanged(steps: tuple[Step, ...]) -> bool:
    """Whether the model still takes all of these steps; False if there are none."""
    return bool(steps) and all(parent._modules.get(key) is child for parent, key, child in steps)


def replaced(model: nn.Module, adapter: str, sites: Iterable[str]) -> list[str]:
    """Return the sites at which the model has no module, or one without a part of the adapter."""
    return [site for site in sites if (module := _module(model, site)) is None or adapter not in named_parts(module)]


def check_in_place(model: nn.Module, adapter: str, sites: Iterable[str]) -> None:
    """Check that every module that an adapter was attached to is still in the model.

    Raises:
        AttachError: one was replaced.
    """
    if gone := replaced(model, adapter, sites):
        more = f" and {len(gone) - 1} more" if gone[1:] else ""
        raise AttachError(
            f"{gone[0]}{more}: the layer was replaced after the adapter {adapter!r} was attached to it (by resize_token_embeddings, "
            "pruning or an assignment?), so the adapter is not in the model there. Detach the adapter, and apply or load it again"
        )


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
