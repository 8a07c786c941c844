"""The diagonal linear recurrence h_t = a_t h_{t-1} + x_t, real or complex."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...segments import CONTINUE, INVALID, RESET, Segments
from .. import _checks, _stretches
from .._backend import interpreted, numba_reason, resolve, triton_reason
from .._deterministic import token_apart
from .._register import TRITON, differentiable, operator, twice_differentiable
from .._spec import OpSpec, Summary, register
from . import reference

__all__ = [
    "linear_scan",
    "linear_scan_apply",
    "linear_scan_carry",
    "linear_scan_matrix",
    "linear_scan_step",
    "linear_scan_summary",
]

_OP = "linear_scan"
ALGORITHMS = ("recurrent", "chunk")
# Groups of fewer channels than this that share one decay are not worth a loop of their own.
_GROUP = 8
# Tokens of a tile of the GPU kernels, which keep the state at the start of each. Under Triton's interpreter tiles are
# short, so that short sequences have several.
_TILE = 8 if interpreted() else 16


def linear_scan(
    a: Tensor,
    x: Tensor,
    *,
    state: Tensor | None = None,
    seg: Segments | None = None,
    reverse: bool = False,
    algorithm: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + x_t, element by element, along axis 1.

    Args:
        a: decay per step (a factor, not a logarithm; any value, 0 included), real or complex, broadcastable to x by
            torch's rules: e.g. (B, L, D), (B, L, 1), (L, D), (D,).
        x: (B, L, *channels), real or complex, with at least one channel axis.
        state: (B, *channels), h before the first token; zeros if None.
        seg: documents and padding.
        reverse: run from the end, h_t = a_t h_{t+1} + x_t; `state` is then h after the last token and the returned
            state is h at the first. With `seg`, every document of a row is run on its own, from its last valid
            token back to its first, also the one that was under way when the row began; no state can enter, so
            `state` must be None.
        algorithm: "recurrent" (one step after the other), "chunk" (about 2 sqrt(L) steps over chunks side by side;
            reference only) or None: the back-end's own choice. All agree to rounding.
        backend: "numba" (float32 and complex64 on CPU), "triton" (the same on GPUs), "reference", or None.

    Returns:
        h (B, L, *channels), and the state (B, *channels) after the last token. h has the dtype of x (complex if
        either input is), the state the dtype in which the recurrence ran: float32 for half-precision inputs.

    Raises:
        ValueError: shapes that do not fit, or `state` together with `reverse` and `seg`.
        TypeError: dtypes that do not go together.
        BackendError: the back-end asked for cannot serve.

    Source: the scan of S5 (Smith et al. 2023, section 2.3) and of Blelloch (1990); `reference.py` is the definition.
    """
    _check(a, x, state, seg, reverse, algorithm)
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.promote_types(_checks.compute_dtype(a), _checks.compute_dtype(x))
    # Real decays of complex inputs stay real in the reference, where the product of the two is cheaper.
    h, out = x.to(_checks.compute_dtype(x)), a.to(_checks.compute_dtype(a))
    if backend is None and seg is None and x.shape[1] == 1 and token_apart():
        # Decode: one token costs less than the way to any kernel.
        start = None if state is None else state.unsqueeze(1)
        y, new = linear_scan_step(a, x, start)
        return y, new.squeeze(1)
    chosen = resolve(_OP, reasons(a, x, state=state, algorithm=algorithm), backend)
    if chosen == "triton":
        # Half precision is converted in the kernel.
        if dtype.is_complex:
            a, x = out.to(dtype), h.to(dtype)
        return _triton(a, x, None if state is None else state.to(dtype), seg, reverse)
    if chosen == "numba" and seg is None and not reverse and not torch.compiler.is_compiling():
        parts = _stretches.count(x.shape[0] * -(-prod(x.shape[2:]) // 16), x.shape[1])
        if parts > 1:
            decay = reference.align(a, x.ndim)
            return _stretches.run(
                parts, partial(linear_scan, backend=backend), partial(linear_scan_summary, backend=backend), state,
                x=x, a=decay.expand(*x.shape[:2], *decay.shape[2:]),
            )  # fmt: skip
    if chosen == "numba":
        h, state = _numba(out.to(dtype), h.to(dtype), None if state is None else state.to(dtype), seg, reverse)
    else:
        h, state = reference.linear_scan(out, h, state=state, seg=seg, reverse=reverse, algorithm=algorithm)
    return (h.to(x.dtype) if half and not dtype.is_complex else h), state


def reasons(
    a: Tensor, x: Tensor, *, state: Tensor | None = None, algorithm: str | None = None, **_: Any
) -> dict[str, str | None]:
    """For each back-end, None if it serves these inputs and else why not."""
    # The kernels take complex64 as well: what is asked of a tensor is asked of its parts.
    parts = [t if t is None or t.dtype != torch.complex64 else t.detach().real for t in (a, x, state)]
    numba, triton = numba_reason(*parts), triton_reason(*parts)
    if algorithm == "chunk":
        numba = numba or "the kernel walks through time; algorithm='chunk' is the reference's"
    if algorithm is not None:
        triton = triton or f"the kernel scans tiles; algorithm={algorithm!r} is a form of the reference"
    return {"numba": numba, "triton": triton, "reference": None}


def linear_scan_step(a: Tensor, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token of `linear_scan`: x (B, *channels), `a` broadcastable to it, state (B, *channels) or None.

    Returns (h, state), which are the same numbers: h in the dtype of x, the state in the dtype it is kept in.
    """
    dtype = torch.promote_types(_checks.compute_dtype(a), _checks.compute_dtype(x))
    new = x.to(dtype) if state is None else torch.addcmul(x.to(dtype), a.to(dtype), state.to(dtype))
    half = x.dtype in (torch.float16, torch.bfloat16) and not dtype.is_complex
    return (new.to(x.dtype) if half else new), new


def linear_scan_matrix(
    a: Tensor, *, length: int | None = None, seg: Segments | None = None, reverse: bool = False
) -> Tensor:
    """The recurrence as matrices: entry [t, s] is the product of the decays of s+1 ... t (of s-1 ... t in reverse).

    Args:
        a: as in `linear_scan` with all of its axes, (B or 1, L or 1, *channels); channel axes may have size 1.
        length: L, needed when neither `a` nor `seg` tells it.

    Returns:
        (B, *channels, L, L), with B = 1 if neither `a` nor `seg` has more rows; lower triangular (upper in reverse).
        `linear_scan_apply` multiplies by it. Memory grows with L squared.
    """
    a, length = _timed("linear_scan_matrix", a, length, seg)
    return reference.linear_scan_matrix(a.to(_checks.compute_dtype(a)), length, seg=seg, reverse=reverse)


def linear_scan_apply(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix` (B, *channels, L, L) times x (B, L, *channels)."""
    dtype = torch.promote_types(matrix.dtype, x.dtype)
    return (matrix.to(dtype) @ x.to(dtype).movedim(1, -1).unsqueeze(-1)).squeeze(-1).movedim(-1, 1)


def linear_scan_summary(a: Tensor, x: Tensor, *, seg: Segments | None = None, backend: str | None = None) -> Summary:
    """This stretch as one element: its last state from a zero state, and the product of its decays.

    Returns:
        Summary(transition, state): state (B, *channels); transition (B, *channels) with size 1 where `a` has it,
        0 if a document starts in the stretch.
    """
    _check(a, x, None, seg, False, None)
    state = linear_scan(a, x, seg=seg, backend=backend)[1]
    a = reference.align(a.to(_checks.compute_dtype(a)), x.ndim)
    if seg is not None:
        a = reference.neutral(a, seg, seg.resets)
    return Summary(a.expand(x.shape[0], x.shape[1], *a.shape[2:]).prod(1), state)


def linear_scan_carry(a: Tensor, *, state: Tensor, seg: Segments | None = None, length: int | None = None) -> Tensor:
    """What `state` (B, *channels) adds to the outputs of a stretch run from zero: (B, L, *channels).

    Args:
        a: as in `linear_scan_matrix`, with the axes of (B, L, *channels).
        length: L, needed when neither `a` nor `seg` tells it.
    """
    a, length = _timed("linear_scan_carry", reference.align(a, state.ndim + 1), length, seg)
    a = a.to(_checks.compute_dtype(a))
    if seg is None:
        return a.expand(a.shape[0], length, *a.shape[2:]).cumprod(1) * state.unsqueeze(1)
    product = reference.neutral(a, seg, seg.resets).cumprod(1)
    gone = seg.document > 0 if seg.valid is None else (seg.document > 0) | ~seg.valid
    return (product * state.unsqueeze(1)).masked_fill(reference.per_token(gone, product.ndim), 0)


# ---- checks and the paths to the kernels ----------------------------------------------------------------------------


def _check(
    a: Tensor, x: Tensor, state: Tensor | None, seg: Segments | None, reverse: bool, algorithm: str | None
) -> None:
    if x.ndim < 3:
        raise ValueError(f"{_OP}: x: want (B, L, *channels) with at least one channel axis, got {tuple(x.shape)}")
    fits = a.ndim <= x.ndim and all(m in (1, n) for m, n in zip(reversed(a.shape), reversed(x.shape)))
    if not fits:
        raise ValueError(f"{_OP}: a: want a shape that broadcasts to x {tuple(x.shape)}, got {tuple(a.shape)}")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"{_OP}: algorithm: want one of {', '.join(ALGORITHMS)} or None, got {algorithm!r}")
    if state is not None:
        if state.shape != x.shape[:1] + x.shape[2:]:
            raise ValueError(
                f"{_OP}: state: want (B, *channels) = {tuple(x.shape[:1] + x.shape[2:])}, got {tuple(state.shape)}"
            )
        if reverse and seg is not None:
            raise ValueError(
                f"{_OP}: state: want None when reverse=True and seg is given, since each document then runs on its "
                f"own from its last token; got a state {tuple(state.shape)}"
            )
    _checks.same_kind(_OP, ("x", x), a=a, state=state)
    _checks.segments(_OP, seg, x.shape[0], x.shape[1], x.device)


def _timed(op: str, a: Tensor, length: int | None, seg: Segments | None) -> tuple[Tensor, int]:
    """`a` and the length, from whichever argument tells it."""
    if a.ndim < 3:
        raise ValueError(f"{op}: a: want (B or 1, L or 1, *channels), got {tuple(a.shape)}")
    told = [n for n in (length, None if seg is None else seg.shape[1]) if n is not None]
    want = told[0] if told else a.shape[1]
    if any(n != want for n in told) or a.shape[1] not in (1, want):
        raise ValueError(
            f"{op}: length: a {tuple(a.shape)}, length={length} and seg "
            f"{None if seg is None else tuple(seg.shape)} do not agree on L"
        )
    if seg is not None and a.shape[0] not in (1, seg.shape[0]):
        raise ValueError(f"{op}: a: want {seg.shape[0]} rows (or 1) like seg, got {tuple(a.shape)}")
    return a, want


def _lower(a: Tensor, x: Tensor, state: Tensor | None, seg: Segments | None, reverse: bool) -> tuple:
    """As the operators see it: `a` (B or 1, L or 1, G), x (B, L, C) with C a multiple of G, state (B, C), marks."""
    channels = x.shape[2:]
    a = reference.align(a, x.ndim)
    shared = x.ndim
    while shared > 2 and a.shape[shared - 1] == 1:
        shared -= 1
    if a.shape[2:shared] != x.shape[2:shared] or prod(x.shape[shared:]) < _GROUP:
        a, shared = a.expand(*a.shape[:2], *channels), x.ndim
    a = a.reshape(a.shape[0], a.shape[1], prod(x.shape[2:shared]))
    marks = None
    if seg is not None:
        marks = reference.scan_order(seg, reverse).to(torch.uint8) * RESET if reverse else seg.marks
        if reverse and seg.valid is not None:
            marks = marks.masked_fill(~seg.valid, INVALID)
    return a, x.flatten(2), None if state is None else state.flatten(1), marks


def _numba(a: Tensor, x: Tensor, state: Tensor | None, seg: Segments | None, reverse: bool) -> tuple[Tensor, Tensor]:
    h, last = _forward(*_lower(a, x, state, seg, reverse), reverse)
    return h.unflatten(2, x.shape[2:]), last.unflatten(1, x.shape[2:])


def _triton(a: Tensor, x: Tensor, state: Tensor | None, seg: Segments | None, reverse: bool) -> tuple[Tensor, Tensor]:
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, x, state))
    # The shape of what is kept would tie an exported program to a length.
    keep = keep and not torch.compiler.is_exporting()
    h, last, _ = _triton_forward(*_lower(a, x, state, seg, reverse), reverse, keep)
    return h.unflatten(2, x.shape[2:]), last.unflatten(1, x.shape[2:])


def _fake_forward(a, x, state, marks, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], x.shape[2])


def _fake_backward(dh, dlast, a, h, state, marks, reverse):
    return h.new_empty(a.shape), h.new_empty(h.shape), h.new_empty(h.shape[0], h.shape[2])


_forward = operator(
    "linear_scan(Tensor a, Tensor x, Tensor? state, Tensor? marks, bool reverse) -> (Tensor, Tensor)",
    "statewise.ops.linear_scan.numba:forward",
    _fake_forward,
)
_backward = operator(
    "linear_scan_backward(Tensor dh, Tensor dlast, Tensor a, Tensor h, Tensor? state, Tensor? marks, bool reverse)"
    " -> (Tensor, Tensor, Tensor)",
    "statewise.ops.linear_scan.numba:backward",
    _fake_backward,
)


def _save(ctx, inputs, output):
    a, _, state, marks, ctx.reverse = inputs
    ctx.save_for_backward(a, output[0], state, marks)


def _grad(ctx, dh, dlast):
    a, h, state, marks = ctx.saved_tensors
    da, dx, dstate = _backward(dh, dlast, a, h, state, marks, ctx.reverse)
    return da, dx, None if state is None else dstate, None, None


def _spread(a: Tensor, x: Tensor) -> Tensor:
    """`a` as `_lower` gives it, for each position and channel of x."""
    return a.repeat_interleave(x.shape[2] // a.shape[2], 2).expand(-1, x.shape[1], -1)


def _definition(a, x, state, marks, reverse):
    """Of what the operators compute. Marks are those of the direction in which the recurrence runs."""
    a = _spread(a, x)
    if reverse:
        a, x, marks = a.flip(1), x.flip(1), None if marks is None else marks.flip(1)
    h, last = reference.linear_scan(a, x, state=state, seg=Segments.from_marks(marks))
    return (h.flip(1) if reverse else h), last


def _from_states(a, h, state, marks, reverse):
    """The inputs of the recurrence from its states: x_t = h_t - a_t h_{t-1}, where t - 1 is the last valid position."""
    turn = (lambda t: t.flip(1)) if reverse else (lambda t: t)
    states, order = turn(h), h.new_zeros(h.shape[:2], dtype=torch.uint8) if marks is None else turn(marks)
    first = torch.zeros_like(states[:, :1]) if state is None else state.unsqueeze(1)
    place = torch.arange(1, h.shape[1] + 1, device=h.device)
    latest = torch.where(order != INVALID, place, 0).cummax(1).values
    before = torch.cat([latest.new_zeros(len(h), 1), latest], 1)[:, :-1]
    earlier = torch.cat([first, states], 1).gather(1, before.unsqueeze(2).expand_as(states))
    # Masked before they are multiplied: what stands at padding, or before a document, may be anything.
    own = (order != CONTINUE).unsqueeze(2)
    carried = turn(_spread(a, h)).masked_fill(own, 0) * earlier.masked_fill(own, 0)
    return a, turn(states - carried), state, marks, reverse


differentiable(_forward, _grad, _save)
twice_differentiable(_backward, 2, _definition, _from_states)


def _fake_triton(a, x, state, marks, reverse, keep):
    rows, L, channels = x.shape
    wide = _checks.compute_dtype(x)
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, channels), dtype=wide),
        x.new_empty((rows, -(-L // _TILE) if keep else 0, channels), dtype=wide),
    )


def _fake_triton_backward(dh, dlast, a, x, state, marks, boundaries, reverse):
    return a.new_empty(a.shape), x.new_empty(x.shape), x.new_empty(0) if state is None else state.new_empty(state.shape)


_triton_forward = operator(
    "linear_scan_triton(Tensor a, Tensor x, Tensor? state, Tensor? marks, bool reverse, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    "statewise.ops.linear_scan.triton:forward",
    _fake_triton,
    device=TRITON,
)
_triton_backward = operator(
    "linear_scan_triton_backward(Tensor dh, Tensor dlast, Tensor a, Tensor x, Tensor? state, Tensor? marks, "
    "Tensor boundaries, bool reverse) -> (Tensor, Tensor, Tensor)",
    "statewise.ops.linear_scan.triton:backward",
    _fake_triton_backward,
    device=TRITON,
)


def _save_triton(ctx, inputs, output):
    *tensors, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(True)


def _grad_triton(ctx, dh, dlast, _):
    a, x, state, marks, boundaries = ctx.saved_tensors
    if boundaries.shape[1] == 0:
        boundaries = _triton_forward(a, x, state, marks, ctx.reverse, True)[2]
    da, dx, dstate = _triton_backward(dh, dlast, a, x, state, marks, boundaries, ctx.reverse)
    return da, dx, None if state is None else dstate, None, None, None


differentiable(_triton_forward, _grad_triton, _save_triton)
twice_differentiable(
    _triton_backward, 2,
    lambda a, x, state, marks, _boundaries, reverse: _definition(a, x, state, marks, reverse),
)  # fmt: skip


register(
    OpSpec(
        name=_OP,
        run=linear_scan,
        reference=partial(linear_scan, algorithm="recurrent", backend="reference"),
        value="x",
        timed=("a", "x"),
        reasons=reasons,
        cases="statewise.ops.linear_scan.cases",
        step=linear_scan_step,
        matrix=linear_scan_matrix,
        apply=linear_scan_apply,
        summary=linear_scan_summary,
        carry=linear_scan_carry,
    )
)
