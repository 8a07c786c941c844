"""Small modules that several mixers hold, named and shaped so that state dicts read like the field's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import silu

from .._names import unknown
from ..ops._checks import compute_dtype
from ..ops.linear import linear
from ..ops.norm import gated_rms_norm, rms_norm


class Linear(nn.Linear):
    """`ops.linear` with a weight (out, in), initialised as PyTorch's."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class RMSNorm(nn.Module):
    """`ops.norm.rms_norm` with the weight (D,) + `offset`, initialised so that the sum is one.

    An offset of 1 (as in Gemma) makes weight decay pull towards the plain norm.
    """

    def __init__(self, d_model: int, eps: float = 1e-5, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((d_model,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        if self.offset == 0:
            return rms_norm(x, self.weight, self.eps)
        # The sum is taken where half precision does not round it.
        weight = self.weight.to(compute_dtype(self.weight)) + self.offset
        return rms_norm(x, weight, self.eps)


class UnitRMSNorm(nn.Module):
    """`ops.norm.rms_norm` without a weight."""

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self.eps)


class GatedRMSNorm(nn.Module):
    """`ops.norm.gated_rms_norm` with a weight (D,), initialised to ones; statistics per group of channels.

    With `norm_before_gate`, rms_norm(x) * silu(z) instead of rms_norm(x * silu(z)).
    """

    def __init__(self, d_model: int, groups: int = 1, eps: float = 1e-5, *, norm_before_gate: bool = False):
        super().__init__()
        self.eps, self.groups, self.norm_before_gate = eps, groups, norm_before_gate
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if self.norm_before_gate:
            return rms_norm(x, self.weight, self.eps, self.groups) * silu(z)
        return gated_rms_norm(x, z, self.weight, self.eps, self.groups)


class StepProjection(Linear):
    """Projection to step sizes. Its bias is left out here: it is added inside the scan, in float32, before softplus."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


class Gate(nn.Module):
    """x * silu(z): what is left of `GatedRMSNorm` without its norm."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return x * silu(z)


def drop_channels(y: Tensor, share: float) -> Tensor:
    """Dropout with one mask per row and channel for the whole sequence, y (B, L, D). A share of 0 changes nothing."""
    return y * F.dropout(torch.ones_like(y[:, :1]), share) if share else y


def check_tail(activation: str, dropout: float, what: str = "") -> None:
    """Raise ValueError for options that `gated_tail` does not have; `what` stands before the message."""
    if activation not in ("gelu", "none"):
        raise ValueError(what + unknown("activation", activation, ("gelu", "none")))
    if not 0 <= dropout < 1:
        raise ValueError(f"{what}dropout: want 0 <= dropout < 1, got {dropout}")


def gated_tail(y: Tensor, activation: str, linear: nn.Module | None, dropout: float, *, twice: bool = False) -> Tensor:
    """What follows a time-invariant core: an activation, dropout, and a linear map to 2 D whose halves gate each other.

    Args:
        y: (B, L, D). activation: "gelu" or "none". linear: the gated map, D to 2 D; None leaves it out.
        dropout: share of the channels that is dropped now (0 outside of training) before the gated map and, with
            `twice`, before the activation as well.
    """
    if twice:
        y = drop_channels(y, dropout)
    if activation == "gelu":
        y = F.gelu(y)
    y = drop_channels(y, dropout)
    return y if linear is None else F.glu(linear(y), -1)  # the first half times the sigmoid of the second


class GatedTail(nn.Module):
    """`gated_tail` with a map of its own.

    Args:
        activation: "gelu" or "none".
        glu: the gated map; False leaves it out.
        dropout: before the gated map, one mask per row and channel for the whole sequence.
    """

    def __init__(self, d_model: int, activation: str = "gelu", glu: bool = True, dropout: float = 0.0):
        super().__init__()
        check_tail(activation, dropout)
        self.activation, self.dropout = activation, dropout
        self.linear = Linear(d_model, 2 * d_model) if glu else None

    def forward(self, y: Tensor) -> Tensor:
        return gated_tail(y, self.activation, self.linear, self.dropout if self.training else 0.0)


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
