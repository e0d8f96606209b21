"""The format of AdaLoRA adapters in PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torchgraft as tg
from torchgraft_plugins.adalora.config import AdaloraConfig

if TYPE_CHECKING:
    from torch import Tensor


class AdaloraPeft:
    """PEFT's ADALORA type: lora_A (r, in), lora_E (r, 1), lora_B (out, r), ΔW = B·diag(E)·A · lora_alpha / (init_r + 1e-5).

    PEFT has one scale for all layers. Where a site's scale differs, E includes the ratio, in float64, so that reading it
    restores the same bits of parameters in up to 32 bits.
    """

    IGNORED = tg.LowRankPeft.IGNORED | frozenset(
        "init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step rank_pattern".split()
    )

    def document(self, sites: Sequence[tuple[tg.Site, AdaloraConfig]], default: AdaloraConfig) -> dict[str, Any]:
        width = max(default.rank, *(config.r for _, config in sites))
        return {
            "peft_type": "ADALORA",
            "init_r": width,
            "target_r": default.target,
            "lora_alpha": default.scale * (width + 1e-5),
            "lora_dropout": default.dropout,
            "total_step": default.total_steps or 2,
            "tinit": default.warmup,
            "tfinal": default.final if default.total_steps else 0,
            "deltaT": default.interval,
            "beta1": default.beta1,
            "beta2": default.beta2,
            "orth_reg_weight": default.orthogonality,
            "init_lora_weights": True,
            "rank_pattern": {f"{site.name}.lora_E": [i < c.r for i in range(width)] for site, c in sites if c.r != width} or None,
        }

    def from_config(self, peft: Mapping[str, Any], site: tg.Site | None = None) -> AdaloraConfig | None:
        if peft.get("peft_type") != "ADALORA":
            return None
        for key, value in peft.items():
            if value and key not in self.IGNORED:
                raise tg.PairingError(f"adapter_config.json: {key}={value!r} is not supported here; load this adapter with PEFT")
        rank, total = int(peft.get("init_r", 12)), max(2, int(peft.get("total_step") or 2))
        final = max(1, min(int(peft.get("tfinal", 0)), total - 1))
        kept = (peft.get("rank_pattern") or {}).get(f"{site.name}.lora_E") if site is not None else None
        return AdaloraConfig(
            rank=rank,
            alpha=(float(peft.get("lora_alpha", 8)) or rank) * rank / (rank + 1e-5),
            dropout=float(peft.get("lora_dropout", 0.0)),
            allocator="budget",
            interval=int(peft.get("deltaT", 1)),
            target_rank=min(rank, int(peft.get("target_r", 8))),
            total_steps=total,
            warmup_steps=min(int(peft.get("tinit", 0)), total - final - 1),
            final_steps=final,
            beta1=float(peft.get("beta1", 0.85)),
            beta2=float(peft.get("beta2", 0.85)),
            orthogonality=float(peft.get("orth_reg_weight", 0.5)),
            current=sum(map(bool, kept)) if kept is not None else None,
        )

    def groups(self, shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> int:
        return 1  # PEFT's AdaLoRA does not support grouped convolutions

    def shapes(self, site: tg.Site, config: AdaloraConfig) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (config.r, site.in_features), "lora_E": (config.r, 1), "lora_B": (site.out_features, config.r)}

    def to_tensors(self, site: tg.Site, config: AdaloraConfig, params: Mapping[str, Tensor], default: AdaloraConfig) -> dict[str, Tensor]:
        e = params["E"] if "E" in params else params["A"].new_ones(config.r, 1)
        if config.scale != default.scale:
            e = e.double() * (config.scale / default.scale)
        return {"lora_A": params["A"], "lora_E": e, "lora_B": params["B"]}

    def from_tensors(
        self, site: tg.Site, config: AdaloraConfig, tensors: Mapping[str, Tensor], default: AdaloraConfig
    ) -> dict[str, Tensor]:
        a, e, b = tensors["lora_A"], tensors["lora_E"], tensors["lora_B"]
        e = (e.double() / (config.scale / default.scale)).to(a.dtype)
        return {"A": a, "B": b} if config.allocator == "energy" else {"A": a, "B": b, "E": e}
