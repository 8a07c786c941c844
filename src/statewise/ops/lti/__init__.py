"""Linear time-invariant systems: the long convolution, the kernel of a diagonal state space, and its recurrence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..._tracing import transformed
from ...segments import Segments
from ...segments import reverse as reverse_time
from .. import _checks, _deterministic
from .._backend import BackendError, numba_reason, resolve
from .._precision import no_autocast
from .._register import recomputing
from .._spec import OpSpec, Summary, register
from . import documents, fixed, forms, reference
from .algorithms import ALGORITHMS as ALGORITHMS  # where the laws look for it
from .algorithms import check_algorithm
from .convolution import convolve
from .one_token import advance, apart, factors
from .reference import OP
from .vandermonde import diagonal_kernel

__all__ = [
    "diagonal_kernel",
    "diagonal_ssm",
    "diagonal_ssm_apply",
    "diagonal_ssm_carry",
    "diagonal_ssm_matrix",
    "diagonal_ssm_step",
    "diagonal_ssm_summary",
    "lti_conv",
]

# Up to this many tokens the plain recurrence is cheaper than setting up any closed form.
_FEW = 8


# ---- long convolution ----------------------------------------------------------------------------------------------


def lti_conv(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None = None,
    *,
    seg: Segments | None = None,
    future: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Causal convolution y_t = sum_{s <= t} kernel[t - s] u_s + D u_t, channel by channel, by Fourier transform.

    Args:
        u: (B, L, D), real.
        kernel: (D, K), real, K >= 1; taps beyond L - 1 have no effect. float32 or float64 (not half precision).
        D: (D,), the skip weight.
        seg: documents and padding. Each document is convolved on its own and padding is skipped, as if it were not
            there. There is no state here, so a document that continues from an earlier chunk is treated as if it
            began at its first token in this one; use `diagonal_ssm` to continue.
        future: (D, F), real: adds sum_{s > t} future[s - t - 1] u_s, at no further cost. Its first tap acts on the next
            position.
        reverse: time runs backwards, per document: y_t = sum_{s >= t} kernel[s - t] u_s + D u_t.
        backend: "numba" (float32 on CPU, up to 65,536 tokens), "reference" (torch.fft), or None.

    Returns:
        y (B, L, D) in the dtype of u, computed in float32 or float64. Errors are relative to the largest output of
        a row, not to each output, as with every Fourier transform.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not go together.

    Source: S4 (Gu et al., 2021), section 2.4.
    """
    sizes: dict[str, int] = {}
    _checks.shape("lti_conv", "u", u, ("B", "L", "D"), sizes)
    _checks.shape("lti_conv", "kernel", kernel, ("D", "K"), sizes)
    if D is not None:
        _checks.shape("lti_conv", "D", D, ("D",), sizes)
    if future is not None:
        _checks.shape("lti_conv", "future", future, ("D", "F"), sizes)
    _checks.same_kind("lti_conv", ("u", u), kernel=kernel, D=D, future=future)
    _checks.segments("lti_conv", seg, sizes["B"], sizes["L"], u.device)
    for name, t in (("u", u), ("kernel", kernel), ("future", future)):
        if t is not None and t.is_complex():
            raise TypeError(f"lti_conv: {name}: want a real tensor, got {t.dtype}")
    if sizes["K"] == 0:
        raise ValueError(f"lti_conv: kernel: want at least one tap, got {tuple(kernel.shape)}")
    real = _checks.compute_dtype(u)
    v, past, ahead = u.to(real), kernel.to(real), None if future is None else future.to(real)
    with no_autocast(u):
        if seg is not None:
            v = seg.mask(v)
        x = reverse_time(v, seg) if reverse else v
        if seg is None:
            y = convolve(x.mT, past, backend, ahead).mT
        elif transformed():
            y = _as_matrices(x, past, ahead, seg)
        elif seg.right_padded:
            # Zeros behind a document add nothing to it, so the rows may stay as they are.
            y = seg.mask(convolve(x.mT, past, backend, ahead).mT)
        else:
            y = _per_document(x, past, ahead, seg, backend)
        if reverse:
            y = reverse_time(y, seg)
    if D is not None:
        y = y + D.to(real) * v
    return y.to(u.dtype)


def _as_matrices(u: Tensor, kernel: Tensor, future: Tensor | None, seg: Segments) -> Tensor:
    """Where how documents lie must not decide what is computed. Takes memory (B, D, L, L)."""
    dense = documents.toeplitz(documents.taps(kernel, u.shape[1]), None, seg, future)
    return (dense @ u.mT.unsqueeze(-1)).squeeze(-1).mT


def _per_document(u: Tensor, kernel: Tensor, future: Tensor | None, seg: Segments, backend: str | None) -> Tensor:
    """Gather documents into rows of their own, those of similar length together, and put the results back."""
    B, L, D = u.shape
    row = torch.arange(B, device=u.device).unsqueeze(1)
    document = seg.document + row * (L + 1)
    valid = torch.ones_like(document, dtype=torch.bool) if seg.valid is None else seg.valid
    where = valid.flatten().nonzero().squeeze(1)
    flat = u.reshape(B * L, D)
    y = torch.zeros_like(flat)
    _, group, count = document.flatten()[where].unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(where), device=u.device) - (count.cumsum(0) - count)[group]
    # Rows are padded to the next power of two at most, so that one long document among many short ones costs little.
    width = torch.pow(2, torch.ceil(torch.log2(count.double()))).long()
    for size in width.unique().tolist():
        members = (width == size).nonzero().squeeze(1)
        mine = (width[group] == size).nonzero().squeeze(1)
        slot = torch.searchsorted(members, group[mine]) * size + rank[mine]
        tokens = where[mine]
        rows = flat.new_zeros(len(members) * size, D).index_copy(0, slot, flat[tokens])
        out = convolve(rows.view(len(members), size, D).mT, kernel, backend, future).mT.reshape(-1, D)
        y = y.index_copy(0, tokens, out[slot])
    return y.view(B, L, D)


# ---- diagonal state space ------------------------------------------------------------------------------------------


def _check_coefficients(log_a, b, c, D, sizes: dict[str, int]) -> None:
    _checks.shape(OP, "log_a", log_a, ("D", "N"), sizes)
    _checks.shape(OP, "b", b, ("D", "N"), sizes)
    _checks.shape(OP, "c", c, ("D", "N"), sizes)
    if D is not None:
        _checks.shape(OP, "D", D, ("D",), sizes)


def reasons(**_) -> dict[str, str | None]:
    """For each back-end, None if it serves these inputs and else why not."""
    return {"reference": None}


def _choose(algorithm: str | None, u: Tensor, seg: Segments | None) -> str:
    if algorithm is None:
        if u.shape[1] <= _FEW:
            return "recurrent"
        # Measured on CPU (N = 32, forward and backward, 1,024 to 4,096 tokens): 2 to 2.5 times as fast as chunks.
        return "fft" if seg is None else "chunk"
    check_algorithm(OP, algorithm, seg)
    return algorithm


# ---- as one operator, for compilers ----------------------------------------------------------------------------------


def _fake(u, log_a, b, c, D, state, position, valid, conjugate, algorithm):
    dtype = reference.lift(u, log_a, b, c)[1]
    return u.new_empty(u.shape), u.new_empty((u.shape[0], *b.shape), dtype=dtype)


def composite(u, log_a, b, c, D, state, position, valid, conjugate, algorithm):
    """What the operator computes."""
    seg = None if position is None else Segments(position, valid)
    return run(u, log_a, b, c, D, conjugate, state, seg, algorithm)


_whole = recomputing(
    OP,
    "Tensor u, Tensor log_a, Tensor b, Tensor c, Tensor? D, Tensor? state, Tensor? position, Tensor? valid, "
    "bool conjugate, str? algorithm",
    2,
    "statewise.ops.lti.whole",
    _fake,
    composite,
    gradients=6,
    device="CompositeExplicitAutograd",
)


def diagonal_ssm(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    *,
    conjugate: bool = True,
    state: Tensor | None = None,
    seg: Segments | None = None,
    final_state: bool = True,
    algorithm: Literal["fft", "chunk", "recurrent"] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_a) h_{t-1} + b u_t and y_t = 2 Re(sum_n c_n h_tn) + D u_t, one system of N modes per channel.

    Args:
        u: (B, L, D), real.
        log_a: (D, N), natural log of the factor per step; real part <= 0 for a stable system. Complex or real.
        b, c: (D, N), complex or real. If any of log_a, b, c is complex, all are taken as complex.
        D: (D,), the skip weight.
        conjugate: complex modes stand for conjugate pairs of which one half is stored. False: each mode stands for
            itself and y takes the real part without the factor 2. Real modes have no such factor either way.
        state: (B, D, N), h before the first token; zeros if None.
        seg: documents and padding.
        final_state: False where the state after the last token is not wanted, which "fft" then leaves out; anything
            may be in its place.
        algorithm: "fft" (one kernel and one Fourier convolution; not with `seg`), "chunk" (matrix products in chunks
            of 64 tokens and states between them; serves everything), "recurrent" (token by token; with gradients its
            memory grows as (B, L, D, N)), or None: "recurrent" up to 8 tokens, "chunk" with `seg`, else "fft".
        backend: "reference" or None; the algorithms are plain PyTorch around `diagonal_kernel` and `lti_conv`, which
            choose their own.

    Returns:
        y (B, L, D) in the dtype of u, and the state (B, D, N) after the last token in the dtype of the computation:
        complex64 (float32 for real modes), or complex128 (float64) for float64 input.

    Raises:
        ValueError: shapes that do not fit, or "fft" with `seg`.
        TypeError: dtypes that do not go together.

    Source: S4D (Gu et al., 2022), section 3; state passing by chunks as in SSD (Dao & Gu, 2024), section 6.
    """
    sizes: dict[str, int] = {}
    _checks.shape(OP, "u", u, ("B", "L", "D"), sizes)
    _check_coefficients(log_a, b, c, D, sizes)
    if state is not None:
        _checks.shape(OP, "state", state, ("B", "D", "N"), sizes)
    if u.is_complex():
        raise TypeError(f"{OP}: u: want a real tensor, got {u.dtype}")
    _checks.same_kind(OP, ("u", u), log_a=log_a, b=b, c=c, D=D, state=state)
    _checks.segments(OP, seg, sizes["B"], sizes["L"], u.device)
    reference.check_state(state, reference.lift(u, log_a, b, c)[1])
    if _deterministic.active():
        _refuse(numba_reason(u), algorithm)
        return fixed.diagonal_ssm(u, log_a, b, c, D, conjugate, state, seg)
    resolve(OP, reasons(), backend)
    if torch.compiler.is_compiling():
        check_algorithm(OP, algorithm, seg)
        position, valid = (None, None) if seg is None else (seg.position, seg.valid)
        return _whole(u, log_a, b, c, D, state, position, valid, conjugate, algorithm)
    return run(u, log_a, b, c, D, conjugate, state, seg, algorithm, final_state)


def run(u, log_a, b, c, D, conjugate, state, seg, algorithm, final_state=True) -> tuple[Tensor, Tensor]:
    """`diagonal_ssm` on arguments that have been checked."""
    chosen = _choose(algorithm, u, seg)
    with no_autocast(u):
        if state is not None and algorithm is None and apart(u, seg):
            real, dtype = reference.lift(u, log_a, b, c)
            skip = None if D is None else D.to(real)
            return advance(factors(log_a.to(dtype), b.to(dtype), c.to(dtype), skip, conjugate=conjugate), u, state)
        if chosen == "recurrent" or u.shape[1] == 0:
            return reference.diagonal_ssm(u, log_a, b, c, D, conjugate=conjugate, state=state, seg=seg)
        return closed_form(chosen, u, log_a, b, c, D, conjugate, state, seg, final_state)


def _refuse(reason: str | None, algorithm: str | None) -> None:
    if algorithm not in (None, "recurrent"):
        reason = f"algorithm={algorithm!r} adds up in an order that depends on the length"
    if reason is not None:
        raise BackendError(f"{OP}: inside statewise.deterministic() only a recurrence on CPU serves: {reason}")


def closed_form(
    chosen, u, log_a, b, c, D, conjugate, state, seg, final_state=True
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`diagonal_ssm` in the form "fft" or "chunk", on arguments that have been checked."""
    real, dtype = reference.lift(u, log_a, b, c)
    v, log_a, b, c = u.to(real), log_a.to(dtype), b.to(dtype), c.to(dtype)
    if dtype.is_complex and conjugate:
        c = 2 * c
    if chosen == "fft":
        y, last = forms.fft(v, log_a, b, c, final_state or state is not None)
    elif seg is None:
        y, last = forms.chunk(v, log_a, b, c)
    else:
        v = seg.mask(v)
        order, document = documents.compact(seg)
        x = v if order is None else v.gather(1, order.unsqueeze(-1).expand_as(v))
        y, last = forms.chunk(x, log_a, b, c, document)
        if order is not None:
            y = torch.zeros_like(y).scatter(1, order.unsqueeze(-1).expand_as(y), y)
    if state is not None:
        state = state.to(dtype) if seg is None else seg.forget(state.to(dtype))
        y = y + _carried(log_a, c, state, v.shape[1], seg)
        last = last + _transition(log_a, v.shape[1], seg) * state
    if D is not None:
        y = y + D.to(real) * v
    return (y if seg is None else seg.mask(y)).to(u.dtype), last


def _carried(log_a: Tensor, c: Tensor, state: Tensor, length: int, seg: Segments | None) -> Tensor:
    """What the state adds to y, (B, L, D), given c that includes the factor for conjugates."""
    y = forms.from_state(log_a, c, state, length).mT
    return y if seg is None else documents.place(y, seg)


def _transition(log_a: Tensor, length: int, seg: Segments | None) -> Tensor:
    """a^(number of valid tokens), zero where a document begins: (1 or B, D, N)."""
    if seg is None:
        return reference.powers(log_a, torch.tensor([length], device=log_a.device)).transpose(0, 1)
    a = reference.powers(log_a, documents.count(seg)).transpose(0, 1)
    return a.masked_fill(seg.resets.any(1)[:, None, None], 0)


def diagonal_ssm_step(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    *,
    conjugate: bool = True,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `diagonal_ssm`: u (B, D), state (B, D, N) or None -> y (B, D), new state."""
    y, state = diagonal_ssm(u.unsqueeze(1), log_a, b, c, D, conjugate=conjugate, state=state)
    return y.squeeze(1), state


def diagonal_ssm_matrix(
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    *,
    conjugate: bool = True,
    length: int | None = None,
    seg: Segments | None = None,
) -> Tensor:
    """`diagonal_ssm` from a zero state as matrices [t, s], lower triangular: (1, D, L, L), or (B, D, L, L) with seg.

    Args:
        length: L, needed without `seg`. Other arguments as in `diagonal_ssm`. Memory grows with L squared.
    """
    length = documents.length("diagonal_ssm_matrix", length, seg)
    _check_coefficients(log_a, b, c, D, {})
    dtype = torch.promote_types(torch.promote_types(log_a.dtype, b.dtype), c.dtype)
    kernel = diagonal_kernel(log_a, c.to(dtype) * b.to(dtype), length, conjugate=conjugate)
    return documents.toeplitz(kernel, D, seg)


def diagonal_ssm_apply(matrix: Tensor, u: Tensor) -> Tensor:
    """`matrix` (1 or B, D, L, L) times u (B, L, D)."""
    dtype = torch.promote_types(matrix.dtype, u.dtype)
    return (matrix.to(dtype) @ u.to(dtype).mT.unsqueeze(-1)).squeeze(-1).mT


def diagonal_ssm_summary(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    *,
    conjugate: bool = True,
    seg: Segments | None = None,
) -> Summary:
    """This stretch as one element: transition exp(valid tokens * log_a), 0 if a document begins in it, and last state.

    Both are (B, D, N).
    """
    _, state = diagonal_ssm(u, log_a, b, c, D, conjugate=conjugate, seg=seg)
    transition = _transition(log_a.to(state.dtype), u.shape[1], seg)
    return Summary(transition.expand_as(state), state)


def diagonal_ssm_carry(
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor,
    conjugate: bool = True,
    length: int | None = None,
    seg: Segments | None = None,
) -> Tensor:
    """What `state` (B, D, N) adds to the outputs of a stretch that was run from zero: (B, L, D).

    Args:
        length: L, needed without `seg`. Other arguments as in `diagonal_ssm`; b and D have no part in the result.
    """
    length = documents.length("diagonal_ssm_carry", length, seg)
    _check_coefficients(log_a, b, c, D, {})
    dtype = state.dtype
    factor = 2 if dtype.is_complex and conjugate else 1
    with no_autocast(log_a):
        state = state if seg is None else seg.forget(state)
        return _carried(log_a.to(dtype), factor * c.to(dtype), state, length, seg)


register(
    OpSpec(
        name=OP,
        run=diagonal_ssm,
        reference=reference.diagonal_ssm,
        value="u",
        timed=("u",),
        reasons=reasons,
        cases="statewise.ops.lti.cases",
        step=diagonal_ssm_step,
        matrix=diagonal_ssm_matrix,
        apply=diagonal_ssm_apply,
        summary=diagonal_ssm_summary,
        carry=diagonal_ssm_carry,
        chunk=forms.CHUNK,
    )
)
