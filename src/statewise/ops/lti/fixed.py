"""`diagonal_ssm` for `statewise.deterministic`: forward as a recurrence in a fixed order, backward by chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...segments import Segments
from .._register import operator
from . import reference

_recurrence = operator(
    "diagonal_ssm_recurrent(Tensor u, Tensor a, Tensor b, Tensor c, Tensor? state, Tensor? marks) -> (Tensor, Tensor)",
    "statewise.ops.lti.recurrent_numba:forward",
    lambda u, a, b, c, state, marks: (u.new_empty(u.shape), b.new_empty((u.shape[0], *b.shape))),
)


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, log_a, b, c, D, state, conjugate, seg):
        ctx.save_for_backward(u, log_a, b, c, D, state)
        ctx.conjugate, ctx.seg = conjugate, seg
        real, dtype = reference.lift(u, log_a, b, c)
        v = u.to(real) if seg is None else seg.mask(u.to(real))
        a = reference.powers(log_a.to(dtype), torch.ones(1, dtype=torch.int64)).squeeze(-2)
        factor = 2 if dtype.is_complex and conjugate else 1
        numbers = [t.to(torch.complex64) for t in (a, b, factor * c)]
        start = None if state is None else state.to(torch.complex64)
        y, last = _recurrence(v, *numbers, start, None if seg is None else seg.marks)
        if D is not None:
            y = y + D.to(real) * v
        return y.to(u.dtype), last if dtype.is_complex else last.real.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        from . import closed_form

        given = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        u, log_a, b, c, D, state = given
        with torch.enable_grad():
            outputs = closed_form("chunk", u, log_a, b, c, D, ctx.conjugate, state, ctx.seg)
        wanted = [t for t in given if t is not None]
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return *(None if t is None else next(found) for t in given), None, None


def diagonal_ssm(u, log_a, b, c, D, conjugate: bool, state, seg: Segments | None) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `ops.diagonal_ssm`, checked."""
    return _Fixed.apply(u, log_a, b, c, D, state, conjugate, seg)
