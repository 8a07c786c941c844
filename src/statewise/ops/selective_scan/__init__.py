"""The selective scan of Mamba (S6): a diagonal system per channel, whose step and directions depend on the input."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...segments import Segments
from .. import _checks, _deterministic, _stretches
from .._backend import interpreted, numba_reason, resolve, triton_reason
from .._dt import Limits, step_size
from .._register import TRITON, differentiable, operator, twice_differentiable
from .._spec import OpSpec, Summary, register
from . import reference

__all__ = [
    "selective_scan",
    "selective_scan_carry",
    "selective_scan_matrix",
    "selective_scan_step",
    "selective_scan_summary",
]

ALGORITHMS = ("chunk", "recurrent")

# T of numba.py, which must not be imported here; opcheck compares the shapes that follow from it.
_TILE = 32
# Positions between the states that the GPU kernels keep: their share of memory is that of one more input in bfloat16 at
# N = 16. Under Triton's interpreter chunks are short, so that short sequences have several.
_CHUNK = 8 if interpreted() else 32
MAX_STATE = 256  # N that fits the registers of a GPU program


def _sizes(op: str, x: Tensor | None, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **others: Tensor | None):
    sizes: dict[str, int] = {}
    if x is not None:
        _checks.shape(op, "x", x, ("B", "L", "D"), sizes)
    _checks.shape(op, "dt", dt, ("B", "L", "D"), sizes)
    _checks.shape(op, "A", A, ("D", "N"), sizes)
    for name, t in (("B", B), ("C", C)):
        _checks.shape(op, name, t, ("B", "L", "N") if t.ndim == 3 else ("B", "L", "G", "N"), sizes)
    if B.ndim != C.ndim:
        raise ValueError(f"{op}: C: want as many axes as B, got {C.ndim} and {B.ndim}")
    if sizes["D"] % sizes.get("G", 1):
        raise ValueError(f"{op}: B: want groups G that divide the {sizes['D']} channels, got G = {sizes['G']}")
    if A.is_complex() != B.is_complex() or A.is_complex() != C.is_complex():
        raise TypeError(f"{op}: want A, B and C all real or all complex, got {A.dtype}, {B.dtype} and {C.dtype}")
    shapes = {"D": ("D",), "z": ("B", "L", "D"), "dt_bias": ("D",), "state": ("B", "D", "N")}
    for name, given in others.items():
        if given is not None:
            _checks.shape(op, name, given, shapes[name], sizes)
    first = ("dt", dt) if x is None else ("x", x)
    _checks.same_kind(op, first, dt=dt, A=A, B=B, C=C, **others)
    return sizes


def _grouped(t: Tensor) -> Tensor:
    return t.unsqueeze(2) if t.ndim == 3 else t


def _per_channel(t: Tensor, channels: int) -> Tensor:
    """(B, L, G, N) -> (B, L, D, N), or (B, L, 1, N) where one group serves all: it broadcasts."""
    t = _grouped(t)
    return t if t.shape[2] == 1 else t.repeat_interleave(channels // t.shape[2], 2)


def _lower(dt, A, dtype, dt_bias, dt_softplus, dt_limit, seg: Segments | None, **values: Tensor):
    """Step size and values in the compute dtype with padding made neutral, and the reset mask."""
    if seg is not None:
        dt = seg.mask(dt)  # before softplus: what stands in padding must not reach a gradient
    dt = step_size(dt, dtype, dt_bias, dt_softplus, dt_limit)
    lowered = {k: v.to(_checks.complex_dtype(dtype) if v.is_complex() else dtype) for k, v in values.items()}
    if seg is None:
        return dt, lowered, None
    return seg.mask(dt), {k: seg.mask(v) for k, v in lowered.items()}, seg.resets


def _complex_like(dtype: torch.dtype, A: Tensor) -> torch.dtype:
    return _checks.complex_dtype(dtype) if A.is_complex() else dtype


def _tail(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, seg: Segments | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    if z is not None:
        y = y * silu((z if seg is None else seg.mask(z)).to(y.dtype))
    return y


def reasons(**inputs) -> dict[str, str | None]:
    """Why each back-end cannot serve these inputs (None: it can), in order of preference."""
    tensors = [t for t in inputs.values() if isinstance(t, Tensor)]
    gpu = triton_reason(*tensors)
    if gpu is None and inputs["A"].shape[-1] > MAX_STATE:
        gpu = f"Triton kernels hold states of N = {MAX_STATE} at most, got N = {inputs['A'].shape[-1]}"
    return {"numba": numba_reason(*tensors), "triton": gpu, "reference": None}


def _definition(x, dt, A, B, C, D, z, dt_bias, state, marks, _boundaries, dt_softplus, low, high):
    """Of what the operators compute, from what is given to those for gradients."""
    return selective_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit=(low, high), state=state, seg=Segments.from_marks(marks),
        backend="reference",
    )  # fmt: skip


# ---- the CPU kernels as operators ------------------------------------------------------------------------------------

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state, "
    "Tensor? marks"
)


def _fake_forward(x, dt, A, B, C, D, z, dt_bias, state, marks, dt_softplus, low, high, keep):
    rows, L, channels = x.shape
    N, groups = A.shape[1], B.shape[2]
    f32 = torch.float32
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, channels, N), dtype=f32),
        x.new_empty((rows, -(-L // _TILE) if keep else 0, groups, N, -(-channels // groups // 16) * 16), dtype=f32),
    )


def _fake_backward(dy, dlast, x, dt, A, B, C, D, z, dt_bias, state, marks, boundaries, dt_softplus, low, high):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dt, A, B, C, D, z, dt_bias, state))


_forward = operator(
    f"selective_scan_numba({_INPUTS}, bool dt_softplus, float low, float high, bool keep) -> (Tensor, Tensor, Tensor)",
    "statewise.ops.selective_scan.numba:forward",
    _fake_forward,
)
_backward = operator(
    f"selective_scan_numba_backward(Tensor dy, Tensor dlast, {_INPUTS}, Tensor boundaries, bool dt_softplus, "
    "float low, float high) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "statewise.ops.selective_scan.numba:backward",
    _fake_backward,
)
_one = operator(
    "selective_scan_numba_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, float low, float high, Tensor state) -> (Tensor, Tensor)",
    "statewise.ops.selective_scan.numba:step",
    lambda x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, state: (
        x.new_empty(x.shape),
        state.new_empty(state.shape, dtype=torch.float32),
    ),
)


def _save(ctx, inputs, output):
    *tensors, dt_softplus, low, high, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = dt_softplus, low, high
    ctx.set_materialize_grads(True)


def _gradients(ctx, dy, dlast, _):
    *tensors, boundaries = ctx.saved_tensors
    if boundaries.shape[1] == 0:
        boundaries = _forward(*tensors, *ctx.options, True)[2]
    grads = _backward(dy, dlast, *tensors, boundaries, *ctx.options)
    return *(None if t is None else g for t, g in zip(tensors, grads)), None, None, None, None, None


differentiable(_forward, _gradients, _save)
twice_differentiable(_backward, 2, _definition)


# ---- the GPU kernels as operators ------------------------------------------------------------------------------------


def _fake_triton(x, dt, A, B, C, D, z, dt_bias, state, marks, dt_softplus, low, high, keep):
    rows, L, channels = x.shape
    N, f32 = A.shape[1], torch.float32
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, channels, N), dtype=f32),
        x.new_empty((rows, -(-L // _CHUNK) if keep else 0, N, channels), dtype=f32),
    )


_triton_forward = operator(
    f"selective_scan_triton({_INPUTS}, bool dt_softplus, float low, float high, bool keep) -> (Tensor, Tensor, Tensor)",
    "statewise.ops.selective_scan.triton:forward",
    _fake_triton,
    device=TRITON,
)
_triton_backward = operator(
    f"selective_scan_triton_backward(Tensor dy, Tensor dlast, {_INPUTS}, Tensor boundaries, bool dt_softplus, "
    "float low, float high) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "statewise.ops.selective_scan.triton:backward",
    _fake_backward,
    device=TRITON,
)
_triton_one = operator(
    "selective_scan_triton_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, float low, float high, Tensor state) -> (Tensor, Tensor)",
    "statewise.ops.selective_scan.triton:step",
    lambda x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, state: (
        x.new_empty(x.shape),
        state.new_empty(state.shape, dtype=torch.float32),
    ),
    device=TRITON,
)


def _gradients_triton(ctx, dy, dlast, _):
    *tensors, boundaries = ctx.saved_tensors
    if boundaries.shape[1] == 0:
        boundaries = _triton_forward(*tensors, *ctx.options, True)[2]
    grads = _triton_backward(dy, dlast, *tensors, boundaries, *ctx.options)
    return *(None if t is None else g for t, g in zip(tensors, grads)), None, None, None, None, None


differentiable(_triton_forward, _gradients_triton, _save)
twice_differentiable(_triton_backward, 2, _definition)


# ---- public ----------------------------------------------------------------------------------------------------------


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: Limits | None = None,
    state: Tensor | None = None,
    seg: Segments | None = None,
    algorithm: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = C_t h_t + D x_t;  then y_t * silu(z_t) if z is given.

    A is discretised by zero-order hold and B by Euler's rule, as every Mamba implementation does.

    Args:
        x: (B, L, D) values.
        dt: (B, L, D) step size, > 0 once bias and softplus are applied; dt = 0 leaves the state as it is.
        A: (D, N) decay rates per unit of dt, real part < 0; the decay of one step is exp(dt A).
        B, C: (B, L, N), or (B, L, G, N) where group g serves D / G neighbouring channels. With complex A, B and C
            are complex too, each stored mode stands for a conjugate pair and y = 2 Re(C h).
        D: (D,) skip weight. z: (B, L, D) gate.
        dt_bias: (D,) added to dt; dt_softplus: then softplus; dt_limit: then clamp to (low, high).
        state: (B, D, N) before the first position; zeros if None.
        seg: packing and padding.
        algorithm: of the reference: "chunk" (default) or "recurrent" (the definition, one position at a time).
        backend: see `statewise.ops.use_backend`. "numba": float32 kernels for CPU; half precision is computed in
            float32. "triton": float32 kernels for GPUs, likewise. "reference": plain PyTorch on any device, for
            float64 and complex numbers.

    Returns:
        y (B, L, D) in x's dtype, and the state (B, D, N) after the last position, in float32 (float64 for float64
        input, complex for complex A). Differentiable in every tensor argument through both.

    Raises:
        ValueError, TypeError: naming the argument whose shape, device or dtype does not fit.
        BackendError: an explicit back-end cannot serve the call.

    Source: Gu & Dao 2023, "Mamba" (arXiv 2312.00752), algorithm 2.
    """
    sizes = _sizes("selective_scan", x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, state=state)
    _checks.segments("selective_scan", seg, sizes["B"], sizes["L"], x.device)
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"selective_scan: algorithm: want 'chunk', 'recurrent' or None, got {algorithm!r}")
    available = reasons(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state)
    if algorithm is not None:
        for name in ("numba", "triton"):
            available[name] = available[name] or f"algorithm={algorithm!r} is a form of the reference"
    chosen = resolve("selective_scan", available, backend)
    if chosen == "numba" and seg is None and not torch.compiler.is_compiling():
        parts = _stretches.count(sizes["B"] * -(-sizes["D"] // 16), sizes["L"])
        if parts > 1:
            options: dict[str, Any] = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
            return _stretches.run(
                parts,
                partial(selective_scan, A=A, D=D, backend=backend, **options),
                partial(selective_scan_summary, A=A, D=D, **options),
                state, x=x, dt=dt, B=B, C=C, z=z,
            )  # fmt: skip
    if chosen != "reference":
        forward, one = (_forward, _one) if chosen == "numba" else (_triton_forward, _triton_one)
        tensors = (x, dt, A, _grouped(B), _grouped(C), D, z, dt_bias)
        low, high = dt_limit or (-math.inf, math.inf)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, state))
        keep = keep and not torch.compiler.is_exporting()  # the shape of what is kept would tie the program to a length
        if sizes["L"] == 1 and seg is None and state is not None and not keep and not _deterministic.active():
            return _one_step(one, tensors, dt_softplus, low, high, state)
        marks = None if seg is None else seg.marks
        y, last, _ = forward(*tensors, state, marks, dt_softplus, low, high, keep)
        return y, last

    dtype = _checks.compute_dtype(x)
    if state is None:
        state = x.new_zeros(sizes["B"], sizes["D"], sizes["N"], dtype=_complex_like(dtype, A))
    dt_, v, resets = _lower(
        dt, A, dtype, dt_bias, dt_softplus, dt_limit, seg,
        x=x, b=_per_channel(B, sizes["D"]), c=_per_channel(C, sizes["D"]),
    )  # fmt: skip
    if seg is not None:
        state = seg.forget(state)
    form = reference.recurrent if algorithm == "recurrent" or sizes["L"] <= 4 else reference.chunked
    A_, state = A.to(_complex_like(dtype, A)), state.to(_complex_like(dtype, A))
    y, state = form(v["x"], dt_, A_, v["b"], v["c"], state, resets)
    return _tail(y, v["x"], D, z, seg).to(x.dtype), state


def _one_step(
    one: Any, tensors: tuple, dt_softplus: bool, low: float, high: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, z, dt_bias = tensors
    y, state = one(
        x[:, 0],
        dt[:, 0],
        A,
        B[:, 0],
        C[:, 0],
        D,
        None if z is None else z[:, 0],
        dt_bias,
        dt_softplus,
        low,
        high,
        state,
    )
    return y[:, None], state


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: Limits | None = None,
    state: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One position of `selective_scan`: x, dt, z (B, D), B and C (B, N) or (B, G, N), state (B, D, N)."""
    y, state = selective_scan(
        x[:, None], dt[:, None], A, B[:, None], C[:, None], D, None if z is None else z[:, None], dt_bias, dt_softplus,
        dt_limit=dt_limit, state=state, backend=backend,
    )  # fmt: skip
    return y[:, 0], state


def selective_scan_matrix(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: Limits | None = None,
    seg: Segments | None = None,
) -> Tensor:
    """(B, D, L, L): y[:, t, d] = sum_s M[:, d, t, s] x[:, s, d]. The gate z is not part of it.

    M[t, s] = C_t exp((dt_{s+1} + ... + dt_t) A) dt_s B_s for t >= s. Memory grows with B D N L^2.
    """
    sizes = _sizes("selective_scan_matrix", None, dt, A, B, C, D=D, dt_bias=dt_bias)
    dtype = _checks.compute_dtype(dt)
    channels, L = sizes["D"], sizes["L"]
    dt_, v, _ = _lower(
        dt, A, dtype, dt_bias, dt_softplus, dt_limit, seg, b=_per_channel(B, channels), c=_per_channel(C, channels)
    )
    keep = torch.ones(L, L, dtype=torch.bool, device=dt.device).tril()
    if seg is not None:
        keep = keep & (seg.document[:, :, None] == seg.document[:, None, :])[:, None]
    # Sum over s+1..t of dt, stretch by stretch: a difference of running sums would cancel.
    strict = torch.ones(L, L, dtype=torch.bool, device=dt.device).tril(-1)
    time = dt_.transpose(1, 2)[..., :, None].expand(-1, -1, -1, L).masked_fill(~strict, 0.0).cumsum(2)  # (B, D, t, s)
    decay = (time[..., None] * A.to(_complex_like(dtype, A))[:, None, None]).exp()  # (B, D, t, s, N)
    b, c = v["b"].transpose(1, 2)[:, :, None], v["c"].transpose(1, 2)[:, :, :, None]
    matrix = reference.read(decay, b * c) * dt_.transpose(1, 2)[:, :, None]
    matrix = matrix.masked_fill(~keep, 0.0)
    if D is not None:
        ones = torch.ones_like(dt_) if seg is None else seg.mask(torch.ones_like(dt_))
        matrix = matrix + torch.diag_embed((D.to(dtype) * ones).transpose(1, 2))
    return matrix


def selective_scan_summary(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: Limits | None = None,
    seg: Segments | None = None,
) -> Summary:
    """The stretch as one element: transition (B, D, N) and state (B, D, N) from zero."""
    _, state = selective_scan(x, dt, A, B, C, None, None, dt_bias, dt_softplus, dt_limit=dt_limit, seg=seg)
    dt_, _, resets = _lower(dt, A, _checks.compute_dtype(x), dt_bias, dt_softplus, dt_limit, seg)
    transition = (dt_.sum(1)[..., None] * A.to(state.dtype)).exp()
    if resets is not None:
        transition = transition.masked_fill(resets.any(1)[:, None, None], 0.0)
    return Summary(transition, state)


def selective_scan_carry(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: Limits | None = None,
    state: Tensor,
    seg: Segments | None = None,
) -> Tensor:
    """What an incoming `state` adds to y (B, L, D) of a run from zero (gated by z if given)."""
    dtype = _checks.compute_dtype(dt)
    dt_, v, resets = _lower(dt, A, dtype, dt_bias, dt_softplus, dt_limit, seg, c=_per_channel(C, dt.shape[-1]))
    decay = (dt_.cumsum(1)[..., None] * A.to(_complex_like(dtype, A))).exp()
    if resets is not None:
        decay = decay.masked_fill((resets.long().cumsum(1) != 0)[..., None, None], 0.0)
    state = state if seg is None else seg.forget(state)
    y = reference.read(decay * state[:, None].to(decay.dtype), v["c"])
    return _tail(y if seg is None else seg.mask(y), y, None, z, seg)


SPEC = register(
    OpSpec(
        name="selective_scan",
        run=selective_scan,
        reference=partial(selective_scan, algorithm="recurrent", backend="reference"),
        step=selective_scan_step,
        matrix=selective_scan_matrix,
        apply=lambda matrix, x: torch.einsum("bdts,bsd->btd", matrix, x.to(matrix.dtype)),
        summary=selective_scan_summary,
        carry=selective_scan_carry,
        value="x",
        timed=("x", "dt", "B", "C", "z"),
        tail=("z",),
        reasons=reasons,
        cases="statewise.ops.selective_scan.cases",
        chunk=_TILE,
    )
)
