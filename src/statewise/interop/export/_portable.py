"""The operators of Statewise in plain PyTorch, for every length: what an exported program holds instead of kernels.

Each function has the signature of the operator that it stands for, and takes no packing (`marks` is None in every
program). A recurrence is a `scan` over short chunks. Inside a chunk it is matrix products where the system allows
(`ssd`, `diagonal_ssm`), else a few steps written out; both were measured against one step per iteration, in
ONNX Runtime and in PyTorch (see docs/export.md). Nothing as large as (B, L, D, N) is ever held.

Complex numbers appear as arguments and results only: inside they are pairs of real numbers, as ONNX has no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from ...ops._dt import step_size
from ...ops.lti.reference import powers

# Positions of a chunk: of matrix products, and of steps written out.
SSD, LTI, STEPS = 32, 16, 8


def scan(body: Callable, start: Tensor, inputs: Sequence[Tensor], *constants: Tensor) -> tuple[Tensor, Tensor]:
    """body(state, *chunk of each input, *constants) -> [new state, output], over axis 0; (last state, outputs)."""
    # The state that a body returns is laid out in order, and what enters has to be laid out as it.
    last, out = scan_op(body, [start.contiguous()], list(inputs), constants)
    return last, out


def chunks(x: Tensor, size: int) -> Tensor:
    """(B, L, ...) -> (K, B, size, ...), zeros after the end.

    There is always one chunk more than needed. With one chunk, PyTorch would take the axis for one to broadcast, and a
    program would serve either one chunk or several.
    """
    length = x.shape[1]
    count = (length + size - 1) // size + 1
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, count * size - length))
    return x.unflatten(1, (-1, size)).transpose(0, 1)


def joined(y: Tensor, length: int) -> Tensor:
    """The inverse of `chunks`."""
    return y.transpose(0, 1).flatten(1, 2)[:, :length]


def times(a: Tensor, h: Tensor) -> Tensor:
    """Product of complex numbers as pairs (..., 2)."""
    (ar, ai), (hr, hi) = a.unbind(-1), h.unbind(-1)
    return torch.stack((ar * hr - ai * hi, ar * hi + ai * hr), -1)


def spread(t: Tensor, heads: int, axis: int) -> Tensor:
    """Groups along `axis`, each for its share of the heads; a single group broadcasts as it is."""
    return t if t.shape[axis] == 1 else t.repeat_interleave(heads // t.shape[axis], axis)


def _unpacked(marks: Tensor | None) -> None:
    if marks is not None:
        raise ValueError("export: programs take rows without packing or padding, got a call with Segments")


# ---- the parts around the recurrences --------------------------------------------------------------------------------


def rms_norm(x, z, weight, eps: float, groups: int) -> Tensor:
    y = x.float()
    if z is not None:
        y = y * F.silu(z.float())
    if groups > 1:
        y = y.unflatten(-1, (groups, -1))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if groups > 1:
        y = y.flatten(-2)
    return (y if weight is None else y * weight).to(x.dtype)


def short_conv(x, weight, bias, state, marks, silu: bool) -> tuple[Tensor, Tensor]:
    _unpacked(marks)
    v, width = x.float(), weight.shape[1]
    if state is None:
        state = v.new_zeros(v.shape[0], width - 1, v.shape[2])
    line = torch.cat([state, v], 1)
    y = F.conv1d(line.mT, weight.unsqueeze(1), bias, groups=weight.shape[0]).mT
    # Counted from the front: a slice to -0 would be empty.
    return (F.silu(y) if silu else y).to(x.dtype), line[:, x.shape[1] :].clone()


def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """`scaled_dot_product_attention` without a kernel of one device."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    score = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        at = torch.arange(q.shape[2], device=q.device)
        attn_mask = at <= at.unsqueeze(1)
    if attn_mask is not None:
        score = torch.where(attn_mask, score, -torch.inf) if attn_mask.dtype == torch.bool else score + attn_mask
    return (score.softmax(-1) @ v.float()).to(v.dtype)


# ---- Mamba -----------------------------------------------------------------------------------------------------------


def _selective(x, dt, A, dt_bias, dt_softplus, low, high) -> tuple[Tensor, Tensor, Tensor]:
    limit = None if (low, high) == (-torch.inf, torch.inf) else (low, high)
    dt = step_size(dt, torch.float32, dt_bias, dt_softplus, limit)
    return x.float(), dt, A.float()


def _tail(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    if D is not None:
        y = y + D * x
    return (y if z is None else y * F.silu(z.float())).to(dtype)


def selective_scan(
    x, dt, A, B, C, D, z, dt_bias, state, marks, dt_softplus: bool, low: float, high: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _unpacked(marks)
    v, dt, A = _selective(x, dt, A, dt_bias, dt_softplus, low, high)
    channels = x.shape[2]
    if state is None:
        state = v.new_zeros(x.shape[0], *A.shape)

    def body(h, dt, v, b, c, A):
        b, c = spread(b, channels, 2), spread(c, channels, 2)
        a, v = (dt.unsqueeze(-1) * A).exp(), v.unsqueeze(-1) * b
        hs = []
        for q in range(STEPS):
            h = a[:, q] * h + v[:, q]
            hs.append(h)
        return [h, (torch.stack(hs, 1) * c).sum(-1)]

    inputs = [chunks(t, STEPS) for t in (dt, dt * v, B.float(), C.float())]
    last, y = scan(body, state, inputs, A)
    return _tail(joined(y, x.shape[1]), v, D, z, x.dtype), last, v.new_empty(0)


def selective_scan_step(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus: bool, low: float, high: float, state
) -> tuple[Tensor, Tensor]:
    v, dt, A = _selective(x, dt, A, dt_bias, dt_softplus, low, high)
    b, c = (spread(t.float(), x.shape[1], 1) for t in (B, C))
    state = (dt.unsqueeze(-1) * A).exp() * state + (dt * v).unsqueeze(-1) * b
    return _tail((state * c).sum(-1), v, D, z, x.dtype), state


# ---- Mamba-2 ---------------------------------------------------------------------------------------------------------


def ssd(x, dt, A, B, C, D, state, marks, chunk: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    _unpacked(marks)
    v, heads = x.float(), x.shape[2]
    if state is None:
        state = v.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
    lower = torch.ones(SSD, SSD, device=x.device).tril()
    unseen = torch.where(lower > 0, 0.0, -torch.inf)

    def body(S, log_a, v, b, c, lower, strict, unseen):
        log_a, v = log_a.mT, v.transpose(1, 2)
        b, c = spread(b, heads, 2).transpose(1, 2), spread(c, heads, 2).transpose(1, 2)
        # Every stretch is summed on its own: a difference of two running sums would cancel.
        decay = (lower @ (log_a.unsqueeze(-1) * strict) + unseen).exp()
        from_start = (log_a @ lower.mT).exp().unsqueeze(-1)
        y = (c @ b.mT * decay) @ v + from_start * (c @ S.mT)
        added = (v * decay[..., -1, :].unsqueeze(-1)).mT @ b
        return [from_start[..., -1:, :] * S + added, y.transpose(1, 2)]

    inputs = [chunks(t, SSD) for t in (dt * A, v * dt.unsqueeze(-1), B.float(), C.float())]
    last, y = scan(body, state, inputs, lower, lower.tril(-1), unseen)
    y = joined(y, x.shape[1])
    return (y if D is None else y + D * v).to(x.dtype), last, v.new_empty(0)


def ssd_step(x, dt, A, B, C, D, state) -> tuple[Tensor, Tensor]:
    v = x.float()
    b, c = (spread(t.float(), x.shape[1], 1).unsqueeze(2) for t in (B, C))
    new = (dt.unsqueeze(-1) * v).unsqueeze(-1) * b
    if state is not None:
        new = new + (dt * A).exp()[..., None, None] * state
    y = (new * c).sum(-1)
    return (y if D is None else y + D * v), new


# ---- linear time-invariant systems -----------------------------------------------------------------------------------


def linear_scan(a, x, state, marks, reverse: bool) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + x_t: a (B or 1, L or 1, G), x (B, L, C), C a multiple of G, all real or all complex."""
    _unpacked(marks)
    is_complex = x.is_complex()
    if is_complex:
        a, x, state = (t if t is None else torch.view_as_real(t) for t in (a, x, state))
    product = times if is_complex else torch.mul
    a = a.repeat_interleave(x.shape[2] // a.shape[2], 2)
    timed = isinstance(a.shape[1], torch.SymInt) or a.shape[1] > 1
    if reverse:
        a, x = a.flip(1), x.flip(1)
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:])

    def body(h, x, a):
        hs = []
        for q in range(STEPS):
            h = product(a[:, q if timed else 0], h) + x[:, q]
            hs.append(h)
        return [h.clone(), torch.stack(hs, 1)]

    if timed:
        a = a.expand(x.shape[0], *a.shape[1:])
        h = scan(body, state, [chunks(x, STEPS), chunks(a, STEPS)])[1]
    else:
        h = scan(body, state, [chunks(x, STEPS)], a)[1]
    h = joined(h, x.shape[1])
    last = h[:, -1].clone()
    if reverse:
        h = h.flip(1)
    return (torch.view_as_complex(h.contiguous()), torch.view_as_complex(last)) if is_complex else (h, last)


def diagonal_ssm(
    u, log_a, b, c, D, state, position, valid, conjugate: bool, algorithm: str | None
) -> tuple[Tensor, Tensor]:
    _unpacked(position)
    v, length = u.float(), u.shape[1]
    kind = torch.promote_types(torch.promote_types(log_a.dtype, b.dtype), c.dtype)
    log_a, b, c = log_a.to(kind), b.to(kind), c.to(kind)
    factor = 2 if kind.is_complex and conjugate else 1
    # All of this depends on weights only, and is a constant of the program.
    at = torch.arange(LTI + 1, device=u.device)
    power = powers(log_a, at)  # (D, Q + 1, N)
    kernel = factor * (power[:, :LTI] * (c * b).unsqueeze(1)).sum(-1)
    inject = _pairs(power[:, :LTI].flip(1) * b.unsqueeze(1))
    emit = _pairs((power[:, 1:] * (factor * c).unsqueeze(1)).conj().resolve_conj()).mT
    kernel, power = kernel.real if kind.is_complex else kernel, _split(power)
    lag = at[:LTI] - at[:LTI].unsqueeze(1)
    toeplitz = kernel[:, lag.clamp(min=0)] * (lag >= 0)
    product = times if kind.is_complex else torch.mul
    h = _split(state).transpose(0, 1) if state is not None else v.new_zeros(u.shape[2], u.shape[0], *power.shape[2:])

    inputs = [chunks(v, LTI)]
    count = inputs[0].shape[0]
    # The last chunk is a part, after which the state would be too old: the scan ends with the state that enters it.
    whole = torch.arange(count, device=u.device) < count - 2

    def body(h, v, whole, toeplitz, inject, emit, decay):
        v = v.permute(2, 0, 1)  # (D, B, Q)
        y = v @ toeplitz + h.flatten(2) @ emit
        return [torch.where(whole, product(decay, h) + (v @ inject).view_as(h), h), y]

    entered, y = scan(body, h, [*inputs, whole], toeplitz, inject, emit, power[:, LTI:])
    y = joined(y.permute(0, 2, 3, 1), length)
    rest = length - (length - 1) // LTI * LTI
    recent = F.pad(v, (0, 0, LTI, 0))[:, length:] * (at[:LTI] >= LTI - rest).unsqueeze(-1)
    last = product(power.index_select(1, at[LTI:] * 0 + rest), entered)
    last = (last + (recent.permute(2, 0, 1) @ inject).view_as(h)).transpose(0, 1)
    if D is not None:
        y = y + D * v
    return y.to(u.dtype), torch.view_as_complex(last.contiguous()) if kind.is_complex else last.contiguous()


def _split(x: Tensor) -> Tensor:
    """(..., N) -> (..., N, 2), real parts and imaginary parts; real tensors stay."""
    return torch.view_as_real(x) if x.is_complex() else x


def _pairs(x: Tensor) -> Tensor:
    """(..., N) -> (..., 2 N); real tensors stay."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


# ---- the table -------------------------------------------------------------------------------------------------------


def table() -> dict[Any, Callable]:
    """Operator -> its plain form, as `ExportedProgram.run_decompositions` takes it."""
    # The operators exist once the files that define them are loaded.
    from ... import ops  # noqa: F401

    ours = torch.ops.statewise
    return {
        ours.rms_norm_numba.default: rms_norm,
        ours.short_conv.default: short_conv,
        ours.selective_scan_numba.default: selective_scan,
        ours.selective_scan_numba_step.default: selective_scan_step,
        ours.ssd_numba.default: ssd,
        ours.ssd_numba_step.default: ssd_step,
        ours.linear_scan.default: linear_scan,
        ours.diagonal_ssm.default: diagonal_ssm,
        torch.ops.aten.scaled_dot_product_attention.default: attend,
    }
