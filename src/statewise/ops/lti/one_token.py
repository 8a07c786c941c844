"""One token of a diagonal state space, in two parts: what depends on its coefficients alone, and the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...segments import Segments
from .. import _checks
from .._backend import resolve
from .._deterministic import token_apart
from .modes import dot_parts, parts
from .reference import NOTHING, OP, check_state


def apart(u: Tensor, seg: Segments | None) -> bool:
    """Whether u (B, L, ...) may be taken as one token. Compilers are not asked to tell lengths apart."""
    return not torch.compiler.is_compiling() and seg is None and u.shape[1] == 1 and token_apart()


class Factors(NamedTuple):
    a: Tensor  # (D, N), or (N,) where all channels have the same: factor per step
    b: Tensor  # (D, N), or (1,) where it is one number
    read: Tensor  # (D, N), or (D, 2 N) for the parts of complex states: y = read . parts(h)
    skip: Tensor | None  # (D,)


def factors(log_a: Tensor, b: Tensor, c: Tensor, D: Tensor | None, *, conjugate: bool = True) -> Factors:
    """Of `ops.diagonal_ssm` with these coefficients, of one dtype."""
    a = torch.exp(log_a.real.clamp(min=NOTHING))
    if log_a.is_complex():
        # PyTorch's `exp` of complex numbers takes five times as long.
        a = torch.complex(a * torch.cos(log_a.imag), a * torch.sin(log_a.imag))
    return Factors(a, b, dot_parts(2 * c if conjugate and c.is_complex() else c), D)


def advance(f: Factors, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """u (B, 1, D), state (B, D, N) -> y (B, 1, D) in the dtype of u, new state."""
    resolve(OP, {"reference": None})
    _checks.shape(OP, "state", state, ("B", "D", "N"), {"B": len(u), "D": u.shape[-1], "N": f.a.shape[-1]})
    _checks.same_kind(OP, ("u", u), log_a=f.a, state=state)
    check_state(state, f.a.dtype)
    u = u.squeeze(1)
    v = u.to(_checks.compute_dtype(u))
    h = torch.addcmul(f.b * v.unsqueeze(-1), f.a, state.to(f.a.dtype))
    y = (parts(h) * f.read).sum(-1)
    return (y if f.skip is None else y + f.skip * v).to(u.dtype).unsqueeze(1), h
