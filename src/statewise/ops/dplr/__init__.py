"""State spaces that are diagonal plus low rank, discretised by the bilinear rule: the convolution kernel of S4, and the
recurrence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...segments import Segments
from .. import _checks, _deterministic
from .._backend import resolve
from .._precision import no_autocast
from .._register import recomputing
from .._spec import OpSpec, register
from ..lti import diagonal_ssm_apply as dplr_ssm_apply
from ..lti import documents, modes
from ..lti.algorithms import ALGORITHMS as ALGORITHMS  # where the laws look for it
from ..lti.algorithms import check_algorithm
from ..lti.convolution import convolve
from ..lti.forms import CHUNK
from . import forms, kernel, loop, reference
from .cauchy import cauchy

__all__ = ["cauchy", "dplr_kernel", "dplr_ssm", "dplr_ssm_apply", "dplr_ssm_matrix", "dplr_ssm_step"]

_OP = "dplr_ssm"
# Up to this many tokens steps in O(N) are cheaper than to make the dense system, which takes O(N^2) a power.
_FEW = 16


def _check_coefficients(w, p, b, c, sizes: dict[str, int]) -> None:
    for name, t, want in (("w", w, ("D", "N")), ("p", p, ("R", "D", "N")), ("b", b, ("D", "N")), ("c", c, ("D", "N"))):
        if t is None:
            continue
        _checks.shape(_OP, name, t, want, sizes)
        if not t.is_complex():
            raise TypeError(
                f"{_OP}: {name}: want a complex tensor (modes are halves of conjugate pairs), got {t.dtype}"
            )


def dplr_kernel(
    w: Tensor,
    p: Tensor,
    b: Tensor,
    c: Tensor,
    length: int,
    *,
    algorithm: Literal["cauchy", "powers"] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The kernel K_l = 2 Re(c A^l B), l = 0 ... length - 1, of the system of `dplr_ssm`.

    Args:
        w, p, b: as in `dplr_ssm`; real part of w < 0 for "cauchy".
        c: (..., D, N), complex; one kernel for each of the leading axes, at little extra cost.
        length: L >= 0.
        algorithm: "cauchy" (the generating function at the roots of unity: a Cauchy product, the Woodbury identity and
            a Fourier transform), "powers" (products of dense powers of A), or None: "cauchy".
        backend: of the Cauchy product, see `cauchy`.

    Returns:
        (..., D, length), real, in the precision of w. Differentiable; the backward pass makes the kernel once more
        instead of keeping what it was made from.

    "powers", and "cauchy" in double precision, square the dense step of 2 N real numbers log2(L) times, which is most
    of their cost for short rows.

    Source: S4 (Gu et al., 2021), section 3.2, Algorithm 1.
    """
    if length < 0:
        raise ValueError(f"dplr_kernel: length: want 0 or more, got {length}")
    if algorithm is not None and algorithm not in kernel.ALGORITHMS:
        want = ", ".join(kernel.ALGORITHMS)
        raise ValueError(f"dplr_kernel: algorithm: want one of {want} or None, got {algorithm!r}")
    sizes: dict[str, int] = {}
    lead = tuple(c.shape[:-2])
    _check_coefficients(w, p, b, None, sizes)
    _checks.shape("dplr_kernel", "c", c, (*lead, "D", "N"), sizes)
    _checks.same_kind("dplr_kernel", ("w", w.real), w=w, p=p, b=b, c=c)
    with no_autocast(w):
        taps = kernel.recomputed(w, p, b, c.reshape(-1, *w.shape), length, algorithm or "cauchy", backend)
        return taps.reshape(*lead, w.shape[0], length)


def reasons(**_) -> dict[str, str | None]:
    """For each back-end, None if it serves these inputs and else why not."""
    return {"reference": None}


def _choose(algorithm: str | None, u: Tensor, seg: Segments | None) -> str:
    if algorithm is None:
        if u.shape[1] <= _FEW:
            return "recurrent"
        return "fft" if seg is None else "chunk"
    check_algorithm(_OP, algorithm, seg)
    return algorithm


# ---- as one operator, for compilers ----------------------------------------------------------------------------------


def _fake(u, w, p, b, c, D, state, position, valid, algorithm):
    return u.new_empty(u.shape), u.new_empty((u.shape[0], *b.shape), dtype=reference.lift(u)[1])


def composite(u, w, p, b, c, D, state, position, valid, algorithm):
    """What the operator computes."""
    return run(u, w, p, b, c, D, state, None if position is None else Segments(position, valid), algorithm)


_whole = recomputing(
    _OP,
    "Tensor u, Tensor w, Tensor p, Tensor b, Tensor c, Tensor? D, Tensor? state, Tensor? position, Tensor? valid, "
    "str? algorithm",
    2,
    "statewise.ops.dplr.whole",
    _fake,
    composite,
    gradients=7,
    device="CompositeExplicitAutograd",
)


def dplr_ssm(
    u: Tensor,
    w: Tensor,
    p: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seg: Segments | None = None,
    final_state: bool = True,
    algorithm: Literal["fft", "chunk", "recurrent"] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = M x + b u for one step of unit length by the bilinear rule, y = 2 Re(c x) + D u; one system per channel.

    M = diag(w) - sum_r p_r p_r^* acts on both halves of each conjugate pair, of which one is stored. In discrete form

        x_t = A x_{t-1} + B u_t,   A = (I - M/2)^-1 (I + M/2),   B = (I - M/2)^-1 b,   y_t = 2 Re(c x_t) + D u_t

    For a continuous system (Lambda, P, B) and a step dt: w = dt Lambda, p = sqrt(dt) P, b = dt B.

    Args:
        u: (B, L, D), real.
        w: (D, N), complex, dt times the eigenvalues of the normal part; real part <= 0, which makes A a contraction.
        p: (R, D, N), complex, sqrt(dt) times the low-rank factors; R >= 1.
        b, c: (D, N), complex.
        D: (D,), the skip weight.
        state: (B, D, N), x before the first token; zeros if None.
        seg: documents and padding.
        final_state: False where the state after the last token is not wanted, which in "fft" costs several times what
            the outputs do; anything may be in its place then.
        algorithm: "fft" (one kernel and one Fourier convolution; not with `seg`), "chunk" (matrix products in chunks
            of 64 tokens and states between them; serves everything), "recurrent" (token by token in O(N) a step; with
            gradients its memory grows as (B, L, D, N)), or None: "recurrent" up to 16 tokens, else "chunk" with `seg`
            and "fft" without; and where no gradient is wanted, on a CPU in single precision, a kernel that takes
            token by token with its state in float64, but for batches of whole rows without states.
        backend: "reference" or None; all algorithms but that kernel are plain PyTorch.

    Returns:
        y (B, L, D) in the dtype of u, and the state (B, D, N) after the last token, complex64, or complex128 for
        float64 input.

    Raises:
        ValueError: shapes that do not fit, or "fft" with `seg`.
        TypeError: dtypes that do not go together.

    Source: S4 (Gu et al., 2021), section 3 and appendix C.
    """
    sizes: dict[str, int] = {}
    _checks.shape(_OP, "u", u, ("B", "L", "D"), sizes)
    _check_coefficients(w, p, b, c, sizes)
    if D is not None:
        _checks.shape(_OP, "D", D, ("D",), sizes)
    if state is not None:
        _checks.shape(_OP, "state", state, ("B", "D", "N"), sizes)
    if u.is_complex():
        raise TypeError(f"{_OP}: u: want a real tensor, got {u.dtype}")
    _checks.same_kind(_OP, ("u", u), w=w, p=p, b=b, c=c, D=D, state=state)
    _checks.segments(_OP, seg, sizes["B"], sizes["L"], u.device)
    resolve(_OP, reasons(), backend)
    if torch.compiler.is_compiling():
        check_algorithm(_OP, algorithm, seg)
        position, valid = (None, None) if seg is None else (seg.position, seg.valid)
        return _whole(u, w, p, b, c, D, state, position, valid, algorithm)
    return run(u, w, p, b, c, D, state, seg, algorithm, final_state)


def run(u, w, p, b, c, D, state, seg, algorithm, final_state=True) -> tuple[Tensor, Tensor]:
    """`dplr_ssm` on arguments that have been checked."""
    # Only the recurrence does for a token what it does for a sequence, bit by bit.
    chosen = "recurrent" if _deterministic.active() and algorithm is None else _choose(algorithm, u, seg)
    bare = seg is None and state is None and not final_state
    with no_autocast(u):
        # One kernel serves all rows of a batch, as long as no state is wanted.
        alone = not bare or len(u) == 1
        if algorithm is None and alone and loop.serves(u, w, p, b, c, D, state):
            # Closed forms with states need dense powers, which alone take longer.
            return loop.run(loop.prepare(w, p, b, c, D), u, state, seg)
        if chosen == "recurrent" or u.shape[1] == 0:
            return reference.dplr_ssm(u, w, p, b, c, D, state=state, seg=seg)
        if chosen == "fft" and bare:
            y = convolve(u.to(w.real.dtype).mT, dplr_kernel(w, p, b, c, u.shape[1])).mT
            y = y if D is None else y + D * u
            return y.to(u.dtype), b.new_empty(u.shape[0], *b.shape)
        return _closed_form(chosen, u, w, p, b, c, D, state, seg)


def _closed_form(chosen, u, w, p, b, c, D, state, seg) -> tuple[Tensor, Tensor]:
    real, dtype = reference.lift(u)
    length, v = u.shape[1], u.to(real)
    w, p, b, c = (t.to(dtype) for t in (w, p, b, c))
    system = forms.System(w, p, b, c.unsqueeze(0))
    if chosen == "fft":
        y, last = convolve(v.mT, dplr_kernel(w, p, b, c, length)).mT, system.last_state(v)
    elif seg is None:
        y, last = system.chunk(v)
    else:
        v = seg.mask(v)
        order, document = documents.compact(seg)
        x = v if order is None else v.gather(1, order.unsqueeze(-1).expand_as(v))
        y, last = system.chunk(x, document)
        if order is not None:
            y = torch.zeros_like(y).scatter(1, order.unsqueeze(-1).expand_as(y), y)
    if state is not None:
        x = state.to(dtype) if seg is None else seg.forget(state.to(dtype))
        x = modes.parts(x).transpose(0, 1)
        extra = system.from_state(x, length).permute(1, 2, 0)
        y = y + (extra if seg is None else documents.place(extra, seg))
        steps = length if seg is None else documents.count(seg)
        old = system.decayed(x, steps)
        last = last + (old if seg is None else old.masked_fill(seg.resets.any(1).view(1, -1, 1), 0))
    if D is not None:
        y = y + D.to(real) * v
    return (y if seg is None else seg.mask(y)).to(u.dtype), modes.whole(last.transpose(0, 1))


def dplr_ssm_step(
    u: Tensor, w: Tensor, p: Tensor, b: Tensor, c: Tensor, D: Tensor | None = None, *, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `dplr_ssm`: u (B, D), state (B, D, N) or None -> y (B, D), new state."""
    y, state = dplr_ssm(u.unsqueeze(1), w, p, b, c, D, state=state, algorithm="recurrent")
    return y.squeeze(1), state


def dplr_ssm_matrix(
    w: Tensor,
    p: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    *,
    length: int | None = None,
    seg: Segments | None = None,
) -> Tensor:
    """`dplr_ssm` from a zero state as matrices [t, s], lower triangular: (1, D, L, L), or (B, D, L, L) with seg.

    Args:
        length: L, needed without `seg`. Other arguments as in `dplr_ssm`. Memory grows with L squared.
    """
    length = documents.length("dplr_ssm_matrix", length, seg)
    return documents.toeplitz(dplr_kernel(w, p, b, c, length), D, seg)


register(
    OpSpec(
        name=_OP,
        run=dplr_ssm,
        reference=reference.dplr_ssm,
        value="u",
        timed=("u",),
        reasons=reasons,
        cases="statewise.ops.dplr.cases",
        step=dplr_ssm_step,
        matrix=dplr_ssm_matrix,
        apply=dplr_ssm_apply,
        chunk=CHUNK,
    )
)
