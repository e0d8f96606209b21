"""What a quantised layer becomes while an adapter is merged into it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Dequantized(nn.Linear):
    """A linear layer that takes inputs of any floating type and answers in that type, as the quantised layers do."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]  # as in nn.Linear itself

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)
