"""The SSD scan of Mamba-2, alone and with the convolution before it and the norm and projection after it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ......ops.short_conv import short_conv
from ......ops.ssd import ssd
from ...._adapt import UNLIMITED, conv_activation, documents, fit, gradients, limits
from ...._missing import missing
from .layernorm_gated import rmsnorm_fn
from .ssd_chunk_state import _chunk_cumsum_fwd

__all__ = [
    "mamba_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_conv1d_scan_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "ssd_chunk_scan_combined_ref",
    "ssd_selective_scan",
]

__getattr__ = missing(__name__)


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int | None, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, dt_softplus: bool = False, dt_limit: Sequence[float] = UNLIMITED,
    algorithm: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mamba_chunk_scan_combined` with its result as `statewise.ops` has it: y and the last state."""
    dt, A, B, C, D, z, dt_bias, state = fit(x, dt, A, B, C, D, z, dt_bias, initial_states)
    return ssd(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, chunk_size, dt_limit=limits(dt_limit, dt_softplus), state=state,
        seg=documents(seq_idx, continues=state is not None), algorithm=algorithm,
    )  # fmt: skip


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: Sequence[float] = UNLIMITED, return_final_states: bool = False, return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
):  # fmt: skip
    """`statewise.ops.ssd`.

    Args:
        x, z: (B, L, H, P). dt: (B, L, H). A, dt_bias: (H,). B, C: (B, L, G, N). D: (H,) or (H, P).
        chunk_size: the kernels choose their own; the result does not depend on it.
        initial_states: (B, H, P, N); with seq_idx it belongs to the document with index 0.
        seq_idx: (B, L), the document of each position; negative: padding.
        cu_seqlens: (S + 1,), where each sequence of a single row begins, and where the last one ends.
        return_varlen_states: also return the state (S, H, P, N) after each of these sequences.
        state_dtype: dtype of the states that are returned; float32 if None.

    Returns:
        y (B, L, H, P), followed by the last state (B, H, P, N) and the states of the sequences, as asked for. Unlike
        in the original, gradients flow through all of them.
    """
    y, last = scan(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit)
    results = [y]
    if return_final_states:
        results.append(last)
    if return_varlen_states:
        results.append(_state_of_each(x, dt, A, B, C, dt_bias, cu_seqlens, initial_states, dt_softplus, dt_limit))
    if state_dtype is not None:
        results[1:] = [state.to(state_dtype) for state in results[1:]]
    return results[0] if len(results) == 1 else tuple(results)


def _state_of_each(x, dt, A, B, C, dt_bias, cu_seqlens, initial_states, dt_softplus, dt_limit) -> Tensor:
    if cu_seqlens is None or x.shape[0] != 1:
        raise ValueError(
            "mamba_chunk_scan_combined: cu_seqlens: want the borders of the sequences of a single row for "
            f"return_varlen_states, got {'None' if cu_seqlens is None else f'{x.shape[0]} rows'}"
        )
    states = []
    before = initial_states  # of the first sequence
    for start, end in pairwise(cu_seqlens.tolist()):
        x_, dt_, B_, C_ = (t[:, start:end] for t in (x, dt, B, C))
        states.append(scan(x_, dt_, A, B_, C_, None, None, None, dt_bias, before, None, dt_softplus, dt_limit)[1])
        before = None
    return torch.cat(states)


def mamba_chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """`mamba_chunk_scan_combined` from zero."""
    return scan(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus)[0]


# In the original a chain of separate kernels; the same map.
ssd_chunk_scan_combined_ref = mamba_chunk_scan


def ssd_selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: Sequence[float] = UNLIMITED,
) -> Tensor:  # fmt: skip
    """The SSD scan by the selective scan of Mamba: dt (B, L, H) or (B, L, H, P), A (H,) or (H, P, N)."""
    from ..selective_scan_interface import scan as selective

    rows, length, heads, width = x.shape
    dt = dt if dt.ndim == 4 else dt[..., None].expand(-1, -1, -1, width)
    A = A if A.ndim == 3 else A[:, None, None].expand(-1, width, B.shape[-1])
    D = D if D is None or D.ndim == 2 else D[:, None].expand(-1, width)
    if dt_bias is not None and dt_bias.ndim == 1:
        dt_bias = dt_bias[:, None].expand(-1, width)
    bound = limits(dt_limit, dt_softplus)
    if bound is not None:  # the interface of the selective scan has no limits
        dt = dt.to(A.dtype) if dt_bias is None else dt.to(A.dtype) + dt_bias
        dt = (torch.nn.functional.softplus(dt) if dt_softplus else dt).clamp(*bound)
        dt_bias, dt_softplus = None, False
    u, delta = (t.flatten(2).transpose(1, 2) for t in (x, dt))
    gate = None if z is None else z.flatten(2).transpose(1, 2)
    B, C = (t.permute(0, 2, 3, 1) for t in (B, C))
    D, dt_bias = (None if t is None else t.flatten() for t in (D, dt_bias))
    y, _ = selective(u, delta, A.flatten(0, 1), B, C, D, gate, dt_bias, dt_softplus)
    return y.view(rows, length, heads, width)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
    chunk_size: int, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
    dt_limit: Sequence[float] = UNLIMITED, return_final_states: bool = False, activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6, outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None, headdim: int | None = None, ngroups: int = 1, norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
):  # fmt: skip
    """All of a Mamba-2 mixer after its input projection.

    Args:
        zxbcdt: (B, L, 2 M + 2 H P + 2 G N + H): gate and value of an MLP of width M (often 0), the gate z, then x, B
            and C for the convolution, and dt.
        conv1d_weight: (H P + 2 G N, K). rmsnorm_weight: (H P,), without it z gates inside the scan.
        D: (H, P), or (H,) with `headdim` P.
        outproj_weight: (O, M + H P), without it the result is not projected.

    Returns:
        (B, L, O); with return_final_states also the last state (B, H, P, N).
    """
    heads, width = D.shape[0], D.shape[1] if D.ndim == 2 else headdim
    if width is None:
        raise ValueError("mamba_split_conv1d_scan_combined: headdim: want P where D is (H,), got None")
    inner = heads * width
    directions = (conv1d_weight.shape[0] - inner) // 2
    mlp = (zxbcdt.shape[-1] - 2 * inner - 2 * directions - heads) // 2
    z0, x0, z, xbc, dt = zxbcdt.split([mlp, mlp, inner, inner + 2 * directions, heads], -1)
    weight, bias = fit(xbc, conv1d_weight, conv1d_bias)
    xbc, _ = short_conv(xbc, weight, bias, conv_activation(activation), seg=documents(seq_idx))
    x, B, C = xbc.split([inner, directions, directions], -1)
    gate = None if rmsnorm_weight is not None else z.unflatten(-1, (heads, width))
    y, last = scan(
        x.unflatten(-1, (heads, width)), dt, A, B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1)),
        chunk_size, D, gate, dt_bias, initial_states, seq_idx, True, dt_limit,
    )  # fmt: skip
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if mlp:
        y = torch.cat([silu(z0) * x0, y], -1)
    if outproj_weight is not None:
        y = linear(y, outproj_weight, outproj_bias)
    return (y, last if state_dtype is None else last.to(state_dtype)) if return_final_states else y


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
    chunk_size: int, dt_limit: Sequence[float] = UNLIMITED, activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6, outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None, headdim: int | None = None, ngroups: int = 1, norm_before_gate: bool = True,
) -> Tensor:  # fmt: skip
    """The same on the plain PyTorch definition."""
    from ......ops import use_backend

    with use_backend("reference"):
        return mamba_split_conv1d_scan_combined(
            zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, None, None, dt_limit, False, activation,
            rmsnorm_weight, rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups, norm_before_gate,
        )  # fmt: skip


def mamba_conv1d_scan_ref(
    xBC: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt: Tensor, A: Tensor, chunk_size: int,
    D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: Sequence[float] = UNLIMITED, activation: str | None = "silu", headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolution and scan on the plain PyTorch definition: xBC (B, L, H P + 2 G N), y (B, L, H P)."""
    from ......ops import use_backend

    heads = dt.shape[-1]
    width = D.shape[1] if D is not None and D.ndim == 2 else headdim
    if width is None:
        raise ValueError("mamba_conv1d_scan_ref: headdim: want P where D is not (H, P), got None")
    directions = (xBC.shape[-1] - heads * width) // 2
    with use_backend("reference"):
        weight, bias = fit(xBC, conv1d_weight, conv1d_bias)
        xBC, _ = short_conv(xBC, weight, bias, conv_activation(activation))
        x, B, C = xBC.split([heads * width, directions, directions], -1)
        x, B, C = x.unflatten(-1, (heads, width)), *(t.unflatten(-1, (ngroups, -1)) for t in (B, C))
        z = None if z is None else z.unflatten(-1, (heads, width))
        return scan(x, dt, A, B, C, chunk_size, D, z, dt_bias, None, None, dt_softplus, dt_limit)[0].flatten(-2)


# ---- the functions behind the autograd wrappers of the original, which some repositories call ------------------------


def _mamba_chunk_scan_combined_fwd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: Sequence[float] = UNLIMITED, state_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(out, out before the gate or None, dt, running sums of dt A, None, last state[, states of the sequences]).

    The fifth, the states between chunks, is None: the kernels choose their own chunks.
    """
    with torch.no_grad():
        y, last = scan(x, dt, A, B, C, chunk_size, D, None, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit)
        sums, steps = _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias, dt_softplus, dt_limit)
        gated = y if z is None else y * silu(z.to(y.dtype))
        results = (gated, None if z is None else y, steps, sums, None, last)
        if cu_seqlens is None:
            return results
        each = _state_of_each(x, dt, A, B, C, dt_bias, cu_seqlens, initial_states, dt_softplus, dt_limit)
        return *results, each


def _mamba_chunk_scan_combined_bwd(
    dout: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, out: Tensor | None, chunk_size: int,
    D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None, dfinal_states: Tensor | None = None, seq_idx: Tensor | None = None,
    dt_softplus: bool = False, dt_limit: Sequence[float] = UNLIMITED, dx: Tensor | None = None,
    ddt: Tensor | None = None, dB: Tensor | None = None, dC: Tensor | None = None, dz: Tensor | None = None,
    recompute_output: bool = False, state_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states), and the gated output if it is asked for."""

    def run(x, dt, A, B, C, D, z, dt_bias, initial_states):
        return scan(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit)

    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    found, (y, _) = gradients(run, inputs, (dout, dfinal_states))
    given = (dx, ddt, None, dB, dC, None, dz, None, None)
    grads = tuple(g if into is None or g is None else into.copy_(g) for g, into in zip(found, given))
    return (*grads, y) if recompute_output else grads
