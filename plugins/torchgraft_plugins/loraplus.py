"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA whose A and B have learning rates of their own.

    μ_A = α_A·μ₀        μ_B = α_B·μ₀

In a wide network A and B learn equally fast only if B's rate is the larger one: the paper and its authors' code take a
ratio of about 16, which is the default here. The other way round, α_A > α_B, is `lr_scale_a=16, lr_scale_b=1`.

The rates are options of every low-rank method: `lr_scale_b=16` on `dora` is LoRA+ on DoRA. Here they have the paper's
defaults; all else is LoRA's, and at scales (1, 1) it is LoRA step for step.
"""

from __future__ import annotations

from pydantic import Field

import torchgraft as tg
from torchgraft import hookimpl
from torchgraft_plugins.lora import (
    adapter_forward as adapter_forward,
    adapter_init as adapter_init,
    adapter_merge as adapter_merge,
    adapter_param_groups as adapter_param_groups,
    adapter_shapes as adapter_shapes,
    adapter_to_lora as adapter_to_lora,
    adapter_unmerge as adapter_unmerge,
)


class LoraPlusConfig(tg.LowRankConfig):
    lr_scale_b: float = Field(16.0, gt=0, allow_inf_nan=False, description="α_B: B's learning rate over the base rate")


@hookimpl
def adapter_method() -> tg.Method:
    return tg.Method(
        name="loraplus",
        config=LoraPlusConfig,
        summary="LoRA with a larger learning rate for B than for A",
        reference="https://arxiv.org/abs/2402.12354",
        buffers=frozenset({"A0", "B0"}),
        roles={"A": "A", "B": "B"},
        additive=True,
        peft=tg.LowRankPeft(claims=False),
    )
