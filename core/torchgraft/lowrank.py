"""What low-rank methods share: how A and B start, and how they stand in PEFT's files. A library for plugins.

Letters as in the papers: W (d, k) the frozen weight, A (r, k), B (d, r), s the scale; ΔW = s·B·A.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

from torchgraft import dtypes, peft_names
from torchgraft.config import LowRankConfig
from torchgraft.errors import ConfigError, PairingError, TorchgraftWarning
from torchgraft.kinds.kind import Shape
from torchgraft.method import Role

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from torchgraft.adapter import Adapter
    from torchgraft.site import Site


def factor_shapes(site: Site, config: LowRankConfig) -> dict[str, Shape]:
    """A (r, k) and B (d, r); for pissa also A0 and B0, of the same shapes."""
    shapes: dict[str, Shape] = {"A": (config.rank, site.in_features), "B": (site.out_features, config.rank)}
    return shapes | {"A0": shapes["A"], "B0": shapes["B"]} if config.init == "pissa" else shapes


def init_factors(site: Site, config: LowRankConfig, generator: Generator) -> dict[str, Tensor]:
    """A and B as `config.init` says.

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
    """Zero the column of an Embedding's padding row. It gets no gradient, so the row stays as it is."""
    if site.padding_idx is not None:
        for name in tensors.keys() & {"A", "A0"}:
            tensors[name][:, site.padding_idx] = 0
    return tensors


def _pissa(site: Site, config: LowRankConfig) -> dict[str, Tensor]:
    import torch

    weight = site.weight()
    if weight.is_meta:
        raise ConfigError(f"{site.name}: pissa starts from the weight's singular vectors, and on the meta device it has no values")
    u, s, vh = torch.linalg.svd(weight.cpu(), full_matrices=False)
    root = (s[: config.rank] / config.scale).sqrt()
    dtype = dtypes.torch_dtype(config.dtype)
    a = (root[:, None] * vh[: config.rank]).to(dtype).contiguous()
    b = (u[:, : config.rank] * root).to(dtype).contiguous()
    return {"A": a, "B": b, "A0": a.clone(), "B0": b.clone()}


def factors(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The A and B whose product is the whole update; for pissa (2r, k) and (d, 2r), with -B0·A0 in it."""
    a, b = params["A"], params["B"]
    if "A0" not in params:
        return a, b
    import torch

    return torch.cat([a, params["A0"]]), torch.cat([b, -params["B0"]], dim=1)


def scaled_param_groups(adapter: Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with the rates of LoRA+ (Hayou et al. 2024, arXiv 2402.12354): μ_A = α_A·μ₀ and μ_B = α_B·μ₀.

    | parameter                     | learning rate           | weight decay   |
    |-------------------------------|-------------------------|----------------|
    | A                             | lr · lr_scale_a         | as given       |
    | B                             | lr · lr_scale_b         | as given       |
    | A and B of an Embedding       | lr · lr_scale_embedding | as given       |
    | magnitude                     | lr                      | none: it would shrink the frozen weight itself |
    | others, modules trained whole | lr                      | as given       |

    The method declares what each of its tensors is, in `Method.roles`.
    """
    groups: dict[tuple[float, float], list[Any]] = defaultdict(list)
    roles = adapter.hooks.method.roles
    for part in adapter.parts.values():
        for name, parameter in part.named_parameters():
            role = roles.get(name)
            decay = 0.0 if role == "magnitude" else weight_decay
            groups[lr * _lr_scale(part.config, role, part.site.kind.name), decay].append(parameter)
    whole = [parameter for copy in adapter.copies.values() for parameter in copy.module.parameters()]
    if whole:
        groups[lr, weight_decay] += whole
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _lr_scale(config: Any, role: Role | None, kind: str) -> float:
    if role not in ("A", "B"):
        return 1.0
    if kind == "Embedding":
        return float(config.lr_scale_embedding)
    return float(config.lr_scale_a if role == "A" else config.lr_scale_b)


class LowRankPeft:
    """The layout of PEFT's LORA type: suffixes lora_A.weight and lora_B.weight, or lora_embedding_A and _B.

    Args:
        claims: whether this method is the one that reads what PEFT itself wrote.
    """

    def __init__(self, *, claims: bool = True) -> None:
        self.claims = claims

    IGNORED = frozenset(
        "auto_mapping base_model_name_or_path corda_config eva_config exclude_modules fan_in_fan_out "
        "inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha "
        "lora_dropout lora_ga_config megatron_core modules_to_save alpha_pattern rank_pattern peft_type "
        "peft_version qalora_group_size r revision runtime_config target_modules task_type use_rslora "
        "use_dora bias".split()
    )
    """What the engine or this class reads, or what has no effect on a trained adapter."""

    def document(self, sites: Sequence[tuple[Site, LowRankConfig]], default: LowRankConfig) -> dict[str, Any]:
        rooted = default.scaling == "alpha/sqrt(r)"
        values = {site.name: self._rank_and_alpha(site, config, default) for site, config in sites}
        rank, alpha = Counter(values.values()).most_common(1)[0][0]
        names = list(values)
        return {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": default.dropout,
            "use_rslora": rooted,
            "init_lora_weights": True,
            "rank_pattern": peft_names.patterns({name: own for name, (own, _) in values.items() if own != rank}, names),
            "alpha_pattern": peft_names.patterns({name: own for name, (_, own) in values.items() if own != alpha}, names),
        }

    def _rank_and_alpha(self, site: Site, config: LowRankConfig, default: LowRankConfig) -> tuple[int, float]:
        rank, rooted = self._peft_rank(site, config), default.scaling == "alpha/sqrt(r)"
        as_it_is = rank == config.rank and config.scaling == default.scaling != "none"
        alpha = config.alpha if as_it_is else config.scale * (sqrt(rank) if rooted else rank)
        return rank, int(alpha) if alpha == int(alpha) else alpha

    def from_config(self, peft: Mapping[str, Any], site: Site | None = None) -> LowRankConfig | None:
        if not self.claims or peft.get("peft_type") != "LORA" or peft.get("use_dora"):
            return None
        if peft.get("bias", "none") != "none":
            raise PairingError(f"adapter_config.json: bias={peft['bias']!r}: trained biases are not supported; only bias='none' is")
        start = peft.get("init_lora_weights")
        if start not in (None, True, False, "gaussian", "orthogonal", "eva"):
            raise PairingError(
                f"adapter_config.json: init_lora_weights={start!r}: PEFT takes such an adapter's start out of the base's weights; "
                "save it with PEFT's path_initial_model_for_weight_conversion=…, which makes it a plain LoRA"
            )
        for key, value in peft.items():
            if value and key not in self.IGNORED:
                raise PairingError(f"adapter_config.json: {key}={value!r} is not supported here; load this adapter with PEFT")
        rank, alpha, groups = peft.get("r", 8), float(peft.get("lora_alpha", 8)), site.groups if site is not None else 1
        if rank % groups:
            raise PairingError(f"{site.name if site else ''}: r = {rank} is no multiple of the layer's {groups} groups")
        return LowRankConfig(
            rank=rank // groups,
            alpha=alpha / (sqrt(groups) if peft.get("use_rslora") else groups),
            dropout=float(peft.get("lora_dropout", 0.0)),
            scaling="alpha/sqrt(r)" if peft.get("use_rslora") else "alpha/r",
        )

    def groups(self, shape: Shape, tensors: Mapping[str, Shape]) -> int:
        first = tensors.get("lora_A.weight", ())  # it sees all input channels, the layer's weight those of one group
        return max(1, first[1] // shape[1]) if len(shape) > 2 and len(first) == len(shape) and shape[1] else 1

    def shapes(self, site: Site, config: LowRankConfig) -> dict[str, Shape]:
        rank, groups = self._peft_rank(site, config), site.groups
        name_a, name_b = self._suffixes(site)
        if not site.kind.dimensions:
            return {name_a: (rank, site.in_features), name_b: (site.out_features, rank)}
        kernel = site.shape[2:]
        return {name_a: (rank, site.shape[1] * groups, *kernel), name_b: (site.out_features, rank // groups, *(1,) * len(kernel))}

    def to_tensors(self, site: Site, config: LowRankConfig, params: Mapping[str, Tensor], default: LowRankConfig) -> dict[str, Tensor]:
        a, b = factors(params)
        shapes = self.shapes(site, config)
        name_a, name_b = self._suffixes(site)
        if site.groups > 1:
            a = _block_diagonal(a.reshape(len(a), *site.shape[1:]), site.groups)
        return {name_a: a.reshape(shapes[name_a]), name_b: b.reshape(shapes[name_b])}

    def from_tensors(self, site: Site, config: LowRankConfig, tensors: Mapping[str, Tensor], default: LowRankConfig) -> dict[str, Tensor]:
        a, b = (tensors[suffix] for suffix in self._suffixes(site))
        if site.groups > 1:
            a = _from_block_diagonal(site, a)
        a, b = a.reshape(-1, site.in_features), b.reshape(site.out_features, -1)
        if config.init != "pissa":
            return {"A": a, "B": b}
        r = config.rank
        return {"A": a[:r], "B": b[:, :r], "A0": a[r:], "B0": -b[:, r:]}

    def _suffixes(self, site: Site) -> tuple[str, str]:
        return ("lora_embedding_A", "lora_embedding_B") if site.kind.name == "Embedding" else ("lora_A.weight", "lora_B.weight")

    def _peft_rank(self, site: Site, config: LowRankConfig) -> int:
        """PEFT has no A0, B0: they are appended to A, B. Nor has it one A for all groups: it is repeated in each."""
        return config.rank * (2 if config.init == "pissa" else 1) * site.groups


def _block_diagonal(filters: Tensor, groups: int) -> Tensor:
    """(r, in/g, k…) → (g·r, in, k…): the same filters for each group's own inputs, zero for the others'."""
    r, width, *kernel = filters.shape
    whole = filters.new_zeros(groups, r, groups, width, *kernel)
    for group in range(groups):
        whole[group, :, group] = filters
    return whole.reshape(groups * r, groups * width, *kernel)


def _from_block_diagonal(site: Site, whole: Tensor) -> Tensor:
    """The inverse of `_block_diagonal`."""
    rows, columns = whole.shape[:2]
    r = rows // site.groups
    filters = whole[:r, : columns // site.groups]
    if not _block_diagonal(filters, site.groups).equal(whole):
        raise PairingError(
            f"{site.name}: this adapter connects inputs and outputs across the layer's {site.groups} groups, so it is no change of "
            "the layer's weight; PEFT's grouped convolutions cannot be merged"
        )
    return filters
