"""IA³ (Liu et al. 2022, arXiv 2205.05638): one trained factor for each output of a layer, or for each of its inputs.

    h = l ⊙ (W₀·x + b)        side = "output", l (out,): for keys and values
    h = W₀·(l ⊙ x) + b        side = "input", l (in,): for the second layer of a feed-forward block

l starts at 1, so training starts at the pretrained model. A merge scales the rows of W₀ and the bias, or the columns of W₀.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

import torchgraft as tg
from torchgraft import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

LINEAR = frozenset({"Linear", "Conv1D", "Linear4bit", "Linear8bitLt"})


class Ia3Config(tg.Config):
    side: Literal["output", "input"] = Field("output", description="scale the layer's outputs, or its inputs")


@hookimpl
def adapter_method() -> tg.Method:
    reference, summary = "https://arxiv.org/abs/2205.05638", "scales the outputs or the inputs of a layer"
    return tg.Method("ia3", Ia3Config, summary, reference, kinds=LINEAR)


@hookimpl
def adapter_init(site: tg.Site, config: Ia3Config) -> dict[str, Tensor]:
    import torch  # imported here, because it takes a second, and `adapt --help` does not need it

    return {"l": torch.ones(site.out_features if config.side == "output" else site.in_features)}


@hookimpl
def adapter_forward(config: Ia3Config, params: Mapping[str, Tensor], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    if config.side == "input":
        return base((x * params["l"]).to(x.dtype))
    h = base(x)
    return (h * params["l"]).to(h.dtype)


@hookimpl
def adapter_merge(config: Ia3Config, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    return weight * _factors(config, params, rows)


@hookimpl
def adapter_unmerge(config: Ia3Config, params: Mapping[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
    factors = _factors(config, params, rows)
    return weight / factors.where(factors != 0, 1)


@hookimpl
def adapter_merge_bias(config: Ia3Config, params: Mapping[str, Tensor], bias: Tensor) -> Tensor:
    return bias * params["l"] if config.side == "output" else bias


def _factors(config: Ia3Config, params: Mapping[str, Tensor], rows: slice) -> Tensor:
    """Return l as a column for these rows, or as a row."""
    return params["l"][rows, None] if config.side == "output" else params["l"]
