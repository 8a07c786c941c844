"""One token of a diagonal-plus-low-rank system, in two parts: what depends on its coefficients alone, and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .. import _checks
from ..lti.modes import dot_parts, parts
from . import reference


class Factors(NamedTuple):
    w: Tensor  # (D, N)
    p: Tensor  # (R, D, N)
    b: Tensor  # (D, N)
    read: Tensor  # (D, 2 N): y = read . parts(state)
    skip: Tensor  # (D,)
    solve: Callable[[Tensor], Tensor]  # by the Woodbury identity, of which a part is made before


def factors(w: Tensor, p: Tensor, b: Tensor, c: Tensor, D: Tensor) -> Factors:
    """Of `ops.dplr_ssm` with these coefficients."""
    return Factors(w, p, b, dot_parts(2 * c), D, reference.stepper(w, p))


def advance(f: Factors, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """u (B, 1, D), state (B, D, N) -> y (B, 1, D) in the dtype of u, new state."""
    _checks.shape("dplr_ssm", "state", state, (len(u), *f.w.shape), {})
    v = u.squeeze(1).to(_checks.compute_dtype(u))
    x = reference.advance(f.solve, f.w, f.p, f.b, state.to(f.w.dtype), v)
    return ((parts(x) * f.read).sum(-1) + f.skip * v).to(u.dtype).unsqueeze(1), x
