"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA with separate learning rates for A and B.

    μ_A = α_A·μ₀        μ_B = α_B·μ₀

In a wide network, A and B learn equally fast only if B has the larger learning rate. The paper and its authors' code use a
ratio of about 16, which is the default here. The opposite, α_A > α_B, is `lr_scale_a=16, lr_scale_b=1`.

Both scales are options of every low-rank method: `lr_scale_b=16` with `dora` is LoRA+ on DoRA. This method only changes their
defaults to the paper's; with scales (1, 1) it equals LoRA step for step.
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
