"""The selective scan of Mamba with the arguments of mamba_ssm: channels first, (B, D, L)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .....ops.norm import rms_norm
from .....ops.selective_scan import selective_scan
from .....ops.short_conv import short_conv
from ..._adapt import fit
from ..._missing import missing

__all__ = [
    "bimamba_inner_fn",
    "bimamba_inner_ref",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "rms_norm_forward",
    "scan",
    "selective_scan_fn",
    "selective_scan_ref",
]

__getattr__ = missing(__name__)


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, *, algorithm: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan_fn` with its result as `statewise.ops` has it: y (B, L, D) and the state (B, D, N)."""
    B, C = _directions(u, A, B, C)
    delta, A, B, C, D, z, delta_bias = fit(u, delta, A, B, C, D, z, delta_bias)
    return selective_scan(
        u.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, None if z is None else z.transpose(1, 2), delta_bias,
        delta_softplus, algorithm=algorithm,
    )  # fmt: skip


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
):  # fmt: skip
    """`statewise.ops.selective_scan`, channels first.

    Args:
        u, delta, z: (B, D, L). A: (D, N), real or complex. D, delta_bias: (D,).
        B, C: (D, N) constant, (B, N, L) or (B, G, N, L); with complex A the last axis holds 2 L numbers, real and
            imaginary parts by turns.
        return_last_state: also return the state (B, D, N), through which gradients flow (the original has none).

    Returns:
        (B, D, L), contiguous.
    """
    y, state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    y = y.transpose(1, 2).contiguous()
    return (y, state) if return_last_state else y


def selective_scan_ref(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
):  # fmt: skip
    """The same by the definition, one position at a time in plain PyTorch."""
    y, state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, algorithm="recurrent")
    y = y.transpose(1, 2).contiguous()
    return (y, state) if return_last_state else y


def _directions(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C as (B, L, N), or as (B, L, G, N) with one G for both."""
    rows, channels, length = u.shape

    def one(t: Tensor) -> Tensor:
        if t.ndim == 2:
            return t.expand(rows, length, channels, -1)
        if A.is_complex():
            t = torch.view_as_complex(t.to(A.real.dtype).unflatten(-1, (-1, 2)).contiguous())
        return t.movedim(-1, 1)

    B, C = one(B), one(C)
    if B.ndim != C.ndim or B.shape[2:-1] != C.shape[2:-1]:
        B, C = (t.unsqueeze(2) if t.ndim == 3 else t for t in (B, C))
        groups = max(B.shape[2], C.shape[2])
        B, C = (t.repeat_interleave(groups // t.shape[2], 2) for t in (B, C))
    return B, C


# ---- the whole inner block: convolution, projections, scan, projection -----------------------------------------------


def _inner(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    A: Tensor, B: Tensor | None, C: Tensor | None, D: Tensor | None, delta_bias: Tensor | None,
    B_proj_bias: Tensor | None, C_proj_bias: Tensor | None, delta_softplus: bool,
    norms: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None), eps: float = 1e-6,
    A_b: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What the inner functions have in common: y (B, L, D), before the output projection."""
    x, z = xz.transpose(1, 2).chunk(2, -1)
    weight, bias = fit(x, conv1d_weight.squeeze(1), conv1d_bias)
    x, _ = short_conv(x, weight, bias, "silu")
    rank, width = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    projected = linear(x, x_proj_weight)
    delta = linear(projected[..., :rank], delta_proj_weight)
    if B is None:
        B = _projected(projected[..., rank : rank + width], B_proj_bias, norms[0], eps, A)
    if C is None:
        C = _projected(projected[..., -width:], C_proj_bias, norms[1], eps, A)
    if norms[2] is not None:
        delta = rms_norm(delta, norms[2], eps)
    u, delta, gate = (t.transpose(1, 2) for t in (x, delta, z))
    y, _ = scan(u, delta, A, B, C, D, gate, delta_bias, delta_softplus)
    if A_b is not None:
        B, C = (t.flip(-1) if t.ndim > 2 else t for t in (B, C))
        y_b, _ = scan(u.flip(-1), delta.flip(-1), A_b, B, C, D, gate.flip(-1), delta_bias, delta_softplus)
        y = y + y_b.flip(1)
    return y


def _projected(t: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, A: Tensor) -> Tensor:
    """(B, L, N) from the projection to the layout of B and C: (B, N, L), or (B, N, 2 L) if A is complex."""
    if bias is not None:
        t = t + bias.to(t.dtype)
    if norm is not None:
        t = rms_norm(t, norm, eps)
    if A.is_complex():
        return t.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(-2)
    return t.transpose(1, 2)


def mamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor, B: Tensor | None = None,
    C: Tensor | None = None, D: Tensor | None = None, delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None, delta_softplus: bool = True,
    checkpoint_lvl: int = 1, b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """All of a Mamba mixer after its input projection.

    Args:
        xz: (B, 2 D, L). conv1d_weight: (D, 1, K). x_proj_weight: (R + 2 N, D). delta_proj_weight: (D, R).
        out_proj_weight: (M, D). A: (D, N).
        B, C: (D, N) constant, or None: a part of the projection of x.
        b_rms_weight, c_rms_weight, dt_rms_weight: weights of root-mean-square norms on B, C and delta.
        checkpoint_lvl: has no effect: the kernels always compute states again in the backward pass.

    Returns:
        (B, L, M).
    """
    y = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, (b_rms_weight, c_rms_weight, dt_rms_weight), b_c_dt_rms_eps,
    )  # fmt: skip
    return linear(y, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    A: Tensor, B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
    delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True, checkpoint_lvl: int = 1,
) -> Tensor:  # fmt: skip
    """`mamba_inner_fn` without the output projection, (B, D, L) (Vision Mamba's fork)."""
    y = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus,
    )  # fmt: skip
    return y.transpose(1, 2)


def bimamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor, A_b: Tensor, B: Tensor | None = None,
    C: Tensor | None = None, D: Tensor | None = None, delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None, delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:  # fmt: skip
    """`mamba_inner_fn` plus a second scan from the end, with decay rates A_b (D, N) (Vision Mamba's fork, "v1")."""
    y = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, A_b=A_b,
    )  # fmt: skip
    return linear(y, out_proj_weight, out_proj_bias)


# The inner functions have no fused kernel here, so one definition serves under both names.
mamba_inner_ref = mamba_inner_fn
bimamba_inner_ref = bimamba_inner_fn


def rms_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6, is_rms_norm: bool = True
) -> Tensor:
    """x (M, D) normed by its root mean square (or as in a layer norm), times weight, plus bias."""
    from .triton.layer_norm import layer_norm_fn

    return layer_norm_fn(x, weight, bias, eps=eps, is_rms_norm=is_rms_norm)
