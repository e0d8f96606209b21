"""Functions that low-rank methods share: the shapes and initial values of A and B. A library for plugins.

Letters as in the papers: W (d, k) the frozen weight, A (r, k), B (d, r), s the scale; ΔW = s·B·A.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING

from torchgraft import dtypes
from torchgraft.errors import ConfigError, TorchgraftWarning
from torchgraft.kinds.kind import Shape
from torchgraft.method.config import LowRankConfig

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from torchgraft.method.site import Site


def factor_shapes(site: Site, config: LowRankConfig) -> dict[str, Shape]:
    """Return the shapes of A (r, k) and B (d, r); for pissa also of A0 and B0, which have the same shapes."""
    shapes: dict[str, Shape] = {"A": (config.rank, site.in_features), "B": (site.out_features, config.rank)}
    return shapes | {"A0": shapes["A"], "B0": shapes["B"]} if config.init == "pissa" else shapes


def init_factors(site: Site, config: LowRankConfig, generator: Generator) -> dict[str, Tensor]:
    """Return initial values of A and B for `config.init`.

    | init          | A                                | B          | B·A at the start            |
    |---------------|----------------------------------|------------|-----------------------------|
    | kaiming       | U(-1/√fan_in, 1/√fan_in)         | 0          | 0                           |
    | gaussian      | N(0, σ²/r)                       | 0          | 0                           |
    | orthogonal    | orthonormal rows (columns: r > k)| 0          | 0                           |
    | swapped       | 0                                | N(0, σ²/r) | 0                           |
    | both-gaussian | N(0, σ²/r)                       | N(0, σ²/r) | not 0: the output changes   |
    | pissa         | √Σ_r·V_rᵀ/√s                     | U_r·√Σ_r/√s | the top r directions of W/s |

    For pissa, A0 and B0 are copies that stay fixed, and ΔW = s·(B·A - B0·A0): it starts at 0 and trains exactly as
    PiSSA (arXiv 2404.02948) does on W - s·B0·A0, without rewriting W.
    """
    import torch

    shapes = factor_shapes(site, config)
    if config.init == "pissa":
        return _without_padding(site, _pissa(site, config))
    a, b = torch.zeros(shapes["A"]), torch.zeros(shapes["B"])
    spread = config.sigma / sqrt(config.rank)
    if config.init == "kaiming":
        bound = 1 / sqrt(site.fan_in)
        a.uniform_(-bound, bound, generator=generator)
    elif config.init == "orthogonal":
        torch.nn.init.orthogonal_(a, generator=generator)
    if config.init in ("gaussian", "both-gaussian"):
        a.normal_(0, spread, generator=generator)
    if config.init in ("swapped", "both-gaussian"):
        b.normal_(0, spread, generator=generator)
    if config.init == "both-gaussian":
        warnings.warn(
            "init both-gaussian: B·A is not 0, so the model's output changes before any training", TorchgraftWarning, stacklevel=2
        )
    dtype = dtypes.torch_dtype(config.dtype)
    return _without_padding(site, {"A": a.to(dtype), "B": b.to(dtype)})


def _without_padding(site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Set the column of an Embedding's padding row to zero. It gets no gradient, so the row does not change in training."""
    if site.padding_idx is not None:
        for name in tensors.keys() & {"A", "A0"}:
            tensors[name][:, site.padding_idx] = 0
    return tensors


def _pissa(site: Site, config: LowRankConfig) -> dict[str, Tensor]:
    import torch

    weight = site.weight()
    if weight.is_meta:
        raise ConfigError(
            f"{site.name}: pissa starts from the weight's singular vectors, and the weight is on the meta device and has no values"
        )
    u, s, vh = torch.linalg.svd(weight.cpu(), full_matrices=False)
    root = (s[: config.rank] / config.scale).sqrt()
    dtype = dtypes.torch_dtype(config.dtype)
    a = (root[:, None] * vh[: config.rank]).to(dtype).contiguous()
    b = (u[:, : config.rank] * root).to(dtype).contiguous()
    return {"A": a, "B": b, "A0": a.clone(), "B0": b.clone()}


def factors(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the A and B whose product is the whole update; for pissa (2r, k) and (d, 2r), which include -B0·A0."""
    a, b = params["A"], params["B"]
    if "A0" not in params:
        return a, b
    import torch

    return torch.cat([a, params["A0"]]), torch.cat([b, -params["B0"]], dim=1)
