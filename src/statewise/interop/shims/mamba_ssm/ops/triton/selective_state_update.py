"""One decoding step of Mamba and Mamba-2, with the state updated in place as mamba_ssm does."""

from __future__ import annotations

import torch
from torch import Tensor

from ......ops.selective_scan import selective_scan_step
from ......ops.ssd import ssd_step
from ...._adapt import fit
from ...._missing import missing

__all__ = ["selective_state_update", "selective_state_update_ref"]

__getattr__ = missing(__name__)


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """h = exp(dt A) h + dt B x; returns C h + D x, times silu(z) if z is given. `state` is written in place.

    Args:
        state: (B, D, N) or, with heads, (B, H, P, N).
        x, dt, z: (B, D) or (B, H, P). A: (D, N) or (H, P, N). D, dt_bias: (D,) or (H, P).
        B, C: (B, N) or (B, G, N), where group g serves neighbouring heads (or channels).
        state_batch_indices: (B,) row of `state` for each row of x; a negative index is padding, whose output is zero.

    Returns:
        (B, D) or (B, H, P). No gradient flows through the state.
    """
    if state_batch_indices is not None:
        return _rows(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    y, new = step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    with torch.no_grad():
        state.copy_(new)
    return y


def _rows(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, indices: Tensor) -> Tensor:
    taken = indices >= 0
    rows = indices[taken].long()
    y, new = step(
        state[rows], x[taken], dt[taken], A, B[taken], C[taken], D, None if z is None else z[taken], dt_bias,
        dt_softplus,
    )  # fmt: skip
    with torch.no_grad():
        state[rows] = new.to(state.dtype)
    return torch.zeros_like(x).masked_scatter(taken.reshape(-1, *(1,) * (x.ndim - 1)), y)


def step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_state_update` as a function: the output and the new state, differentiable in everything."""
    if torch.is_grad_enabled():
        state = state.clone()  # the backward pass needs what the caller is about to overwrite
    state, dt, A, B, C, D, z, dt_bias = fit(x, state, dt, A, B, C, D, z, dt_bias)
    if state.ndim == 3:
        return selective_scan_step(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state=state)
    B, C = (t if t.ndim == 3 else t[:, None] for t in (B, C))
    if A.stride(-1) == A.stride(-2) == dt.stride(-1) == 0 and (dt_bias is None or dt_bias.stride(-1) == 0):
        # Heads whose channels share A and dt by expansion are those of Mamba-2: one exponential a head.
        bias = None if dt_bias is None else dt_bias[:, 0]
        return ssd_step(x, dt[..., 0], A[:, 0, 0], B, C, D, z, bias, dt_softplus, state=state)
    z, D, dt_bias = (None if t is None else t.flatten(-2) for t in (z, D, dt_bias))
    y, new = selective_scan_step(
        x.flatten(1), dt.flatten(1), A.flatten(0, 1), B, C, D, z, dt_bias, dt_softplus, state=state.flatten(1, 2)
    )
    return y.view_as(x), new.view_as(state)


def selective_state_update_ref(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """The same on the plain PyTorch definition."""
    from ......ops import use_backend

    with use_backend("reference"):
        return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
