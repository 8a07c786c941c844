"""The step size of selective models: bias, softplus and clamp, in the precision of the recurrence."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from ._checks import compute_dtype

Limits = tuple[float, float]


def step_size(
    dt: Tensor, dtype, bias: Tensor | None = None, use_softplus: bool = False, limit: Limits | None = None
) -> Tensor:
    """clamp(softplus(dt + bias), *limit) in `dtype`; bias broadcasts over the last axis."""
    dt = dt.to(dtype)
    if bias is not None:
        dt = dt + bias.to(dtype)
    if use_softplus:
        dt = softplus(dt)
    if limit is not None:
        dt = dt.clamp(*limit)
    return dt


def decay_rate(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) < 0, in float32 for half-precision parameters: a decay close to 1 needs the digits."""
    return -A_log.to(compute_dtype(A_log)).exp()
