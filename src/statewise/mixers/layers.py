"""Small modules that several mixers hold, named and shaped so that state dicts read like the field's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.norm import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """`ops.norm.rms_norm` with a weight (D,), initialised to ones."""

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """`ops.norm.gated_rms_norm` with a weight (D,), initialised to ones; statistics per group of channels."""

    def __init__(self, d_model: int, groups: int = 1, eps: float = 1e-5):
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(x, z, self.weight, self.eps, self.groups)


class StepProjection(nn.Linear):
    """Projection to step sizes. Its bias is left out here: it is added inside the scan, in float32, before softplus."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class ShortConv(nn.Module):
    """Weight (D, K) and bias (D,) of a depthwise causal convolution; the mixer calls `ops.short_conv` with them.

    Initialised as PyTorch's Conv1d: uniform in +-1/sqrt(K), because each channel has a fan-in of K.
    """

    def __init__(self, channels: int, width: int, bias: bool = True):
        super().__init__()
        if not 1 <= width <= 8:
            raise ValueError(f"d_conv: want a width from 1 to 8, got {width}")
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    @property
    def width(self) -> int:
        return self.weight.shape[1]
