"""The kernel of a diagonal state space as a Vandermonde product: closed form, or kernels for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _deterministic
from .._backend import numba_reason, resolve
from .._register import differentiable, operator
from . import forms
from .reference import powers

# Positions that share one exact power; in between the kernels turn and shrink the power of the block before.
SEGMENT, BLOCK = 1024, 64
# Below this many taps the closed form is as quick.
_FEW = 64


def reasons(log_a: Tensor, coeff: Tensor) -> dict[str, str | None]:
    """For each back-end, None if it serves these inputs and else why not, in order of preference."""
    reason = numba_reason(*(t.new_empty(0).real for t in (log_a, coeff)))
    if reason is None and not (log_a.is_complex() and coeff.is_complex()):
        reason = "Numba kernels take complex modes, got real ones"
    return {"numba": reason, "reference": None}


def vandermonde(log_a: Tensor, coeff: Tensor, length: int, backend: str | None = None) -> Tensor:
    """Re(sum_n coeff_n a_n^l) for l < length: log_a (D, N), coeff (..., D, N) -> (..., D, length).

    Measured for D = 256 and N = 32, one thread of an AMD EPYC (AVX2): see docs/s4.md.
    """
    few = backend is None and (length < _FEW or _deterministic.active())
    if few or resolve("diagonal_kernel", reasons(log_a, coeff), backend) == "reference":
        return forms.vandermonde(log_a, coeff, length)
    at = torch.arange(BLOCK, device=log_a.device)
    with torch.no_grad():
        fine = powers(log_a, at).mT  # (D, N, BLOCK)
        coarse = powers(log_a, SEGMENT * torch.arange(-(-length // SEGMENT), device=log_a.device)).mT
        step = powers(log_a, at[-1:] + 1).squeeze(-2)
    parts = [t.contiguous() for w in (fine, coarse, step) for t in (w.real, w.imag)]
    c = coeff.reshape(-1, *log_a.shape)
    return _forward(log_a, c.real.contiguous(), c.imag.contiguous(), *parts, length).reshape(*coeff.shape[:-1], length)


_POWERS = ", ".join(f"Tensor {name}" for name in ("fine_r", "fine_i", "coarse_r", "coarse_i", "step_r", "step_i"))

_forward = operator(
    f"vandermonde_numba(Tensor log_a, Tensor c_r, Tensor c_i, {_POWERS}, int length) -> Tensor",
    "statewise.ops.lti.vandermonde_numba:forward",
    lambda log_a, c_r, c_i, *rest: c_r.new_empty((*c_r.shape[:2], rest[-1])),
)
_backward = operator(
    f"vandermonde_numba_backward(Tensor dk, Tensor c_r, Tensor c_i, {_POWERS}) -> (Tensor, Tensor, Tensor)",
    "statewise.ops.lti.vandermonde_numba:backward",
    lambda dk, c_r, c_i, *rest: (
        c_r.new_empty(c_r.shape[1:], dtype=torch.complex64), c_r.new_empty(c_r.shape), c_i.new_empty(c_i.shape)
    ),
)  # fmt: skip


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:9])


def _gradients(ctx, dk):
    return *_backward(dk, *ctx.saved_tensors), *[None] * 7


differentiable(_forward, _gradients, _save)
