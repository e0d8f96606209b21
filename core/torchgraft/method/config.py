"""Options of methods: one frozen pydantic model per method."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from torchgraft.errors import ConfigError, near

if TYPE_CHECKING:
    from torchgraft.method.site import Site

DType = Literal["float32", "bfloat16", "float16", "float64"]


class Config(BaseModel):
    """Base class of every method's options. Values are checked strictly: rank="8" is an error, not an 8."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    adapter_wide: ClassVar[frozenset[str]] = frozenset()
    """Options that apply to the whole adapter and cannot be overridden for single sites."""

    def advise(self, site: Site) -> str:
        """Return a warning about this config on `site`; empty if there is none.

        It is called for each site before anything is created; the caller adds the layers' names.

        Raises:
            ConfigError: this config cannot be used on this site.
        """
        return ""

    def weight_bits(self) -> float | None:
        """Return the bits in which the method stores each entry of a frozen weight, for estimates of memory; None if unchanged."""
        return None

    def with_(self, method: str, values: Mapping[str, Any]) -> Self:
        """Return a checked copy in which `values` replace this config's own."""
        return parse_config(method, type(self), {**self.model_dump(), **values})


class LowRankConfig(Config):
    """The options that all low-rank methods share. ΔW = s·B·A with A (rank, in) and B (out, rank)."""

    rank: int = Field(8, ge=1, description="r, the inner dimension of B·A")
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False, description="α, the strength of the update; see scaling")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability with which inputs of A are dropped in training")
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "none"] = Field(
        "alpha/r", description="s: α/r, or α/√r (rank-stabilized, arXiv 2312.03732), or 1"
    )
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "swapped", "both-gaussian"] = Field(
        "kaiming", description="how A and B start; all but both-gaussian leave the model's output as it was"
    )
    sigma: float = Field(1.0, gt=0, allow_inf_nan=False, description="σ of the gaussian inits: entries are N(0, σ²/r)")
    dtype: DType = Field("float32", description="dtype of the adapter's parameters")
    lr_scale_a: float = Field(1.0, gt=0, allow_inf_nan=False, description="A's learning rate over the base rate")
    lr_scale_b: float = Field(1.0, gt=0, allow_inf_nan=False, description="B's learning rate over the base rate")
    lr_scale_embedding: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="learning rate of A and B of an Embedding over the base rate"
    )

    @field_validator("init", mode="before")
    @classmethod
    def _refuse_both_zero(cls, value: object) -> object:
        if value in ("zero", "zeros", "both-zero", "both zero"):
            raise ValueError("with A = 0 and B = 0 the gradients of both are always zero, so nothing would train; use kaiming")
        return value

    @field_validator("dtype", mode="before")
    @classmethod
    def _name_of_dtype(cls, value: object) -> object:
        return str(value).removeprefix("torch.")

    @property
    def scale(self) -> float:
        """s in ΔW = s·B·A."""
        return {"alpha/r": self.alpha / self.rank, "alpha/sqrt(r)": self.alpha / sqrt(self.rank), "none": 1.0}[self.scaling]

    def advise(self, site: Site) -> str:
        full = min(site.out_features, site.in_features)
        if self.rank <= full:
            return ""
        if self.init == "pissa":
            raise ConfigError(f"{site.name}: pissa needs rank = {self.rank} singular vectors, and the layer has {full}; lower the rank")
        return f"rank {self.rank} is more than min(out, in) = {full}: a rank of {full} can express every change of the layer"


C = TypeVar("C", bound=Config)


def parse_config(method: str, config: type[C], values: Mapping[str, Any]) -> C:
    """Check `values` against the options of `method`.

    Raises:
        ConfigError: an option is unknown, or a value has the wrong type or is out of range; the message names every such option.
    """
    try:
        return config(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(method, config, problem) for problem in error.errors())) from None


def explained(error: Exception) -> str:
    """Return what is wrong with a config, without the parts of pydantic's message that describe pydantic."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))} = {each['input']!r}: {each['msg']}" for each in error.errors())
    return " ".join(str(error).split())


def _explain(method: str, config: type[Config], problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if not name:  # the error is about several options together
        return f"{method}: {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] == "extra_forbidden":
        close = near(name, config.model_fields)
        return f"{method} has no option {name!r}{close}; its options are {', '.join(config.model_fields)}"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{method}: {name} = {problem['input']!r}: {reason[:1].lower()}{reason[1:]}"
