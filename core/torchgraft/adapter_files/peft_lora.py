"""Convert the adapters of low-rank methods to PEFT's files and back. For a whole adapter: pairing/peft.py reads, writing.py writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

from torchgraft.adapter_files import peft_names
from torchgraft.errors import PairingError
from torchgraft.kinds.kind import Shape
from torchgraft.method.config import LowRankConfig
from torchgraft.method.lowrank import factors

if TYPE_CHECKING:
    from torch import Tensor

    from torchgraft.method.site import Site


class LowRankPeft:
    """The layout of PEFT's LORA type: suffixes lora_A.weight and lora_B.weight, or lora_embedding_A and _B.

    Args:
        claims: whether this method reads adapters that PEFT wrote.
    """

    def __init__(self, *, claims: bool = True) -> None:
        self.claims = claims

    READ = frozenset(
        "alpha_pattern base_model_name_or_path bias exclude_modules init_lora_weights layers_pattern layers_to_transform lora_alpha "
        "lora_dropout modules_to_save peft_type r rank_pattern target_modules use_dora use_rslora".split()
    )
    """Entries of adapter_config.json that the engine or this class reads."""
    HARMLESS = frozenset(
        "auto_mapping corda_config eva_config fan_in_fan_out inference_mode loftq_config lora_ga_config megatron_core peft_version "
        "qalora_group_size revision runtime_config task_type".split()
    )
    """Entries without effect on a trained adapter."""
    IGNORED = READ | HARMLESS
    """Entries that `from_config` accepts with any value."""

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
        return self._config(peft, site) if self._is_own(peft) else None

    def _is_own(self, peft: Mapping[str, Any]) -> bool:
        """Whether this method reads such an adapter."""
        return self.claims and peft.get("peft_type") == "LORA" and not peft.get("use_dora")

    def _config(self, peft: Mapping[str, Any], site: Site | None) -> LowRankConfig:
        """Convert the config.

        Raises:
            PairingError: it has an entry that the method does not support.
        """
        self._check(peft)
        rank, alpha, groups = peft.get("r", 8), float(peft.get("lora_alpha", 8)), site.groups if site is not None else 1
        if rank % groups:
            raise PairingError(f"{site.name if site else ''}: r = {rank} is not a multiple of the layer's {groups} groups")
        return LowRankConfig(
            rank=rank // groups,
            alpha=alpha / (sqrt(groups) if peft.get("use_rslora") else groups),
            dropout=float(peft.get("lora_dropout", 0.0)),
            scaling="alpha/sqrt(r)" if peft.get("use_rslora") else "alpha/r",
        )

    def _check(self, peft: Mapping[str, Any]) -> None:
        """Refuse entries that the method does not support.

        Raises:
            PairingError: there is one.
        """
        if peft.get("bias", "none") != "none":
            raise PairingError(f"adapter_config.json: bias={peft['bias']!r}: trained biases are not supported; only bias='none' is")
        start = peft.get("init_lora_weights")
        if start not in (None, True, False, "gaussian", "orthogonal", "eva"):
            raise PairingError(
                f"adapter_config.json: init_lora_weights={start!r}: PEFT subtracts its initial value from the base's weights; "
                "save it with PEFT's path_initial_model_for_weight_conversion=…, which makes it a plain LoRA"
            )
        for key, value in peft.items():
            if value and key not in self.IGNORED:
                raise PairingError(f"adapter_config.json: {key}={value!r} is not supported here; load this adapter with PEFT")

    def groups(self, shape: Shape, tensors: Mapping[str, Shape]) -> int:
        first = tensors.get("lora_A.weight", ())  # A has all input channels, the weight only those of one group
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
        """Return the rank in PEFT's files: A0 and B0 are appended to A and B, and A is repeated for each group."""
        return config.rank * (2 if config.init == "pissa" else 1) * site.groups


def _block_diagonal(filters: Tensor, groups: int) -> Tensor:
    """(r, in/g, k…) → (g·r, in, k…): repeat the filters for the inputs of each group, with zeros elsewhere."""
    r, width, *kernel = filters.shape
    whole = filters.new_zeros(groups, r, groups, width, *kernel)
    for group in range(groups):
        whole[group, :, group] = filters
    return whole.reshape(groups * r, groups * width, *kernel)


def _from_block_diagonal(site: Site, whole: Tensor) -> Tensor:
    """Invert `_block_diagonal`."""
    rows, columns = whole.shape[:2]
    r = rows // site.groups
    filters = whole[:r, : columns // site.groups]
    if not _block_diagonal(filters, site.groups).equal(whole):
        raise PairingError(
            f"{site.name}: this adapter connects inputs and outputs across the layer's {site.groups} groups, so it is not a change of "
            "the layer's weight; PEFT's grouped convolutions cannot be merged"
        )
    return filters


def kinds_told(shape: Shape, tensors: Mapping[str, Shape]) -> list[str]:
    """Return the kinds that a layer whose weight has `shape` can be of, by the shapes of PEFT's tensors for it (suffix → shape).

    A is (r, in) and B (out, r), so a weight that is not square is a Linear's (out, in) or a Conv1D's (in, out).
    """
    if "lora_embedding_A" in tensors:
        return ["Embedding"]
    a, b = tensors.get("lora_A.weight", ()), tensors.get("lora_B.weight", ())
    if len(a) != len(shape) or len(b) != len(shape):
        return []
    if len(shape) > 2:
        return [f"Conv{len(shape) - 2}d"]
    forms = {"Linear": (b[0], a[1]), "Conv1D": (a[1], b[0])}
    return [kind for kind, stored in forms.items() if shape == stored]
