"""The options of AdaLoRA."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

import torchgraft as tg

ENERGY_ONLY = ("epsilon", "max_rank", "growth", "tolerance")
BUDGET_ONLY = ("target_rank", "total_steps", "warmup_steps", "final_steps", "beta1", "beta2", "orthogonality")


class AdaloraConfig(tg.LowRankConfig):
    allocator: Literal["energy", "budget"] = Field(
        "energy", description="energy: by the singular values of the update; budget: the paper's"
    )
    interval: int = Field(50, ge=1, description="steps between two decisions")
    epsilon: float = Field(0.01, ge=0, lt=1, description="energy: the share of Σσ² that may be dropped each time")
    min_rank: int | None = Field(None, ge=0, description="lower bound for the rank of each layer [energy: 1, budget: 0]")
    max_rank: int | None = Field(None, ge=1, description="energy: upper bound for the rank of each layer [twice the initial rank]")
    growth: int = Field(2, ge=1, description="energy: directions added to each layer when the validation loss stalls")
    tolerance: float = Field(
        0.001, ge=0, lt=1, description="energy: the validation loss stalls if it improves by a smaller relative amount"
    )
    target_rank: int | None = Field(None, ge=0, description="budget: the mean rank at the end [rank / 1.5]")
    total_steps: int | None = Field(None, ge=1, description="budget: T, the number of optimizer steps; required")
    warmup_steps: int | None = Field(None, ge=0, description="budget: t_i, steps before the first decision [T / 10]")
    final_steps: int | None = Field(None, ge=1, description="budget: t_f, steps after the last decision [T / 10]")
    beta1: float = Field(0.85, gt=0, lt=1, description="budget: β₁, of the mean sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="budget: β₂, of its uncertainty")
    orthogonality: float = Field(0.1, ge=0, allow_inf_nan=False, description="budget: γ, the weight of the penalty")
    current: int | None = Field(None, ge=0, description="the current rank, if training has changed it; set by adapter.step")

    adapter_wide: ClassVar[frozenset[str]] = frozenset(
        "allocator interval growth tolerance target_rank total_steps warmup_steps final_steps beta1 beta2".split()
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.init == "pissa":
            raise ValueError("init = 'pissa' holds fixed what the allocator would have to drop; use kaiming, gaussian or orthogonal")
        others = BUDGET_ONLY if self.allocator == "energy" else ENERGY_ONLY
        if given := [name for name in others if getattr(self, name) != type(self).model_fields[name].default]:
            raise ValueError(f"{', '.join(given)}: allocator = {self.allocator!r} has no use for it")
        if self.max_rank is not None and self.max_rank < self.rank:
            raise ValueError(f"max_rank = {self.max_rank} is below the initial rank, {self.rank}")
        for name, rank in (("min_rank", self.least), ("current", self.r)):
            if rank > self.most:
                raise ValueError(f"{name} = {rank} is above the largest rank, {self.most}")
        if self.allocator == "budget":
            self._check_budget()
        return self

    def _check_budget(self) -> None:
        if self.total_steps is None:
            raise ValueError("allocator = 'budget' follows a schedule: give total_steps, the number of optimizer steps of the run")
        if self.init != "kaiming":
            raise ValueError("allocator = 'budget' starts with Λ = 0 and gaussian P, Q, as the paper does; leave out init")
        if self.warmup + self.final >= self.total_steps:
            raise ValueError(f"warmup_steps + final_steps = {self.warmup + self.final} leave nothing of total_steps = {self.total_steps}")
        if self.target > self.rank:
            raise ValueError(f"target_rank = {self.target} is above the initial rank, {self.rank}")

    @property
    def r(self) -> int:
        """The current rank."""
        return self.rank if self.current is None else self.current

    @property
    def least(self) -> int:
        return self.min_rank if self.min_rank is not None else 1 if self.allocator == "energy" else 0

    @property
    def most(self) -> int:
        if self.allocator == "budget":
            return self.rank
        return self.max_rank if self.max_rank is not None else 2 * self.rank

    @property
    def target(self) -> int:
        return self.target_rank if self.target_rank is not None else max(1, round(self.rank / 1.5))

    @property
    def warmup(self) -> int:
        return self.warmup_steps if self.warmup_steps is not None else (self.total_steps or 0) // 10

    @property
    def final(self) -> int:
        return self.final_steps if self.final_steps is not None else max(1, (self.total_steps or 0) // 10)

    def at(self, rank: int) -> AdaloraConfig:
        """Return a copy of this config with the current rank `rank`."""
        return self.with_("adalora", {"current": rank})
