"""SSD (state space duality): the scalar-decay recurrence of Mamba-2."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...segments import Segments
from .. import _checks, _deterministic, _stretches
from .._backend import numba_reason, resolve, triton_reason
from .._dt import Limits, step_size
from .._precision import no_autocast
from .._register import TRITON, differentiable, operator, recomputing, twice_differentiable
from .._spec import OpSpec, Summary, register
from . import reference

__all__ = ["ssd", "ssd_carry", "ssd_matrix", "ssd_step", "ssd_summary"]

ALGORITHMS = ("chunk", "recurrent")

# Measured on CPU over L = 128 ... 8192 (P = 64, N = 128): 64 is within a few percent of the best everywhere.
CHUNK = 64
MAX_CHUNK = 1024  # of the kernels, whose scratch memory grows with its square
MAX_STATE = 256  # N that fits the registers of a GPU program


def _sizes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, **others: Tensor | None):
    sizes: dict[str, int] = {}
    _checks.shape("ssd", "x", x, ("B", "L", "H", "P"), sizes)
    _coefficient_sizes(dt, A, B, C, sizes)
    if state is not None:
        _checks.shape("ssd", "state", state, ("B", "H", "P", "N"), sizes)
    D, z, dt_bias = others.get("D"), others.get("z"), others.get("dt_bias")
    if D is not None:
        _checks.shape("ssd", "D", D, ("H",) if D.ndim == 1 else ("H", "P"), sizes)
    if z is not None:
        _checks.shape("ssd", "z", z, ("B", "L", "H", "P"), sizes)
    if dt_bias is not None:
        _checks.shape("ssd", "dt_bias", dt_bias, ("H",), sizes)
    _checks.same_kind("ssd", ("x", x), dt=dt, A=A, B=B, C=C, state=state, **others)
    return sizes


def _coefficient_sizes(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sizes: dict[str, int]) -> None:
    _checks.shape("ssd", "dt", dt, ("B", "L", "H"), sizes)
    _checks.shape("ssd", "A", A, ("H",), sizes)
    _checks.shape("ssd", "B", B, ("B", "L", "G", "N"), sizes)
    _checks.shape("ssd", "C", C, ("B", "L", "G", "N"), sizes)
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"ssd: B: want groups G that divide the {sizes['H']} heads, got G = {sizes['G']}")


def _steps(dt, dtype, dt_bias, dt_softplus, dt_limit, seg: Segments | None) -> Tensor:
    """Step size in the compute dtype, zero in padding."""
    if seg is not None:
        dt = seg.mask(dt)  # before softplus: what stands in padding must not reach a gradient
    dt = step_size(dt, dtype, dt_bias, dt_softplus, dt_limit)
    return dt if seg is None else seg.mask(dt)


def _lower(dt, A, dtype, dt_bias, dt_softplus, dt_limit, seg: Segments | None, *values: Tensor):
    """Step size, log decay and values with padding made neutral, and the reset mask."""
    dt = _steps(dt, dtype, dt_bias, dt_softplus, dt_limit, seg)
    values = tuple(v.to(dtype) for v in values)
    if seg is not None:
        values = tuple(seg.mask(v) for v in values)
    return dt, dt * A.to(dtype), values, None if seg is None else seg.resets


def reasons(**inputs) -> dict[str, str | None]:
    """Why each back-end cannot serve these inputs (None: it can), in order of preference."""
    tensors = [t for t in inputs.values() if isinstance(t, Tensor)]
    gpu = triton_reason(*tensors)
    if gpu is None and inputs["B"].shape[-1] > MAX_STATE:
        gpu = f"Triton kernels hold states of N = {MAX_STATE} at most, got N = {inputs['B'].shape[-1]}"
    return {"numba": numba_reason(*tensors), "triton": gpu, "reference": None}


# ---- the CPU kernels as operators ------------------------------------------------------------------------------------

_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state"


def _fake_forward(x, dt, A, B, C, D, state, marks, chunk, keep):
    (rows, L, H, P), N = x.shape, B.shape[3]
    f32 = torch.float32
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, H, P, N), dtype=f32),
        x.new_empty((rows, -(-L // chunk) if keep else 0, H, P, N), dtype=f32),
    )


def _fake_backward(dy, dlast, x, dt, A, B, C, D, state, marks, boundaries, chunk):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dt, A, B, C, D, state))


def _fake_step(x, dt, A, B, C, D, state):
    f32 = torch.float32
    return x.new_empty(x.shape, dtype=f32), x.new_empty((*x.shape, B.shape[2]), dtype=f32)


_forward = operator(
    f"ssd_numba({_INPUTS}, Tensor? marks, int chunk, bool keep) -> (Tensor, Tensor, Tensor)",
    "statewise.ops.ssd.numba:forward",
    _fake_forward,
)
# The same in a fixed order; its backward pass is that of the other.
_recurrent = operator(
    f"ssd_recurrent({_INPUTS}, Tensor? marks, int chunk, bool keep) -> (Tensor, Tensor, Tensor)",
    "statewise.ops.ssd.recurrent_numba:forward",
    _fake_forward,
)
_backward = operator(
    f"ssd_numba_backward(Tensor dy, Tensor dlast, {_INPUTS}, Tensor? marks, Tensor boundaries, int chunk) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "statewise.ops.ssd.numba:backward",
    _fake_backward,
)
_one = operator(f"ssd_numba_step({_INPUTS}) -> (Tensor, Tensor)", "statewise.ops.ssd.numba:step", _fake_step)


def _definition(x, dt, A, B, C, D, state, marks, _boundaries, chunk):
    """Of what the operators compute, from what is given to the one for gradients."""
    seg = Segments.from_marks(marks)
    return ssd(x, dt, A, B, C, D, chunk_size=chunk, state=state, seg=seg, backend="reference")


def _save(ctx, inputs, output):
    *tensors, chunk, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.chunk = chunk
    ctx.set_materialize_grads(True)


def _gradients(ctx, dy, dlast, _):
    *tensors, boundaries = ctx.saved_tensors
    if boundaries.shape[1] == 0:
        boundaries = _forward(*tensors, ctx.chunk, True)[2]
    grads = _backward(dy, dlast, *tensors, boundaries, ctx.chunk)
    return *(None if t is None else g for t, g in zip(tensors, grads)), None, None, None


differentiable(_forward, _gradients, _save)
differentiable(_recurrent, _gradients, _save)
twice_differentiable(_backward, 2, _definition)


# ---- the GPU kernels as operators ------------------------------------------------------------------------------------

_GPU_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state"
_GPU_OPTIONS = "bool dt_softplus, float low, float high"


def _fake_triton(x, dt, A, B, C, D, z, dt_bias, state, marks, dt_softplus, low, high, chunk):
    rows, _, H, P = x.shape
    return x.new_empty(x.shape), x.new_empty((rows, H, P, B.shape[3]), dtype=torch.float32)


def _fake_triton_step(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, low, high):
    return x.new_empty(x.shape), x.new_empty((*x.shape, B.shape[2]), dtype=torch.float32)


def _definition_triton(x, dt, A, B, C, D, z, dt_bias, state, marks, dt_softplus, low, high, chunk):
    return ssd(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, chunk or None, dt_limit=(low, high), state=state,
        seg=Segments.from_marks(marks), backend="reference",
    )  # fmt: skip


_triton_forward = recomputing(
    "ssd_triton", f"{_GPU_INPUTS}, Tensor? marks, {_GPU_OPTIONS}, int chunk", 2, "statewise.ops.ssd.triton",
    _fake_triton, _definition_triton, gradients=9, device=TRITON,
)  # fmt: skip
_triton_one = operator(
    f"ssd_triton_step({_GPU_INPUTS}, {_GPU_OPTIONS}) -> (Tensor, Tensor)",
    "statewise.ops.ssd.triton:step",
    _fake_triton_step,
    device=TRITON,
)


def _on_gpu(
    tensors: tuple, dt_softplus: bool, dt_limit: Limits | None, chunk_size: int | None, state: Tensor | None,
    seg: Segments | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    low, high = dt_limit or (-math.inf, math.inf)
    if tensors[0].shape[1] == 1 and seg is None and not _differentiated(*tensors, state):
        x, dt, A, B, C, D, z, dt_bias = tensors
        y, state = _triton_one(
            x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, None if z is None else z[:, 0], dt_bias, state,
            dt_softplus, low, high,
        )  # fmt: skip
        return y[:, None], state
    marks = None
    if seg is not None:
        marks, state = seg.marks, None if state is None else seg.forget(state)
    return _triton_forward(*tensors, state, marks, dt_softplus, low, high, chunk_size or 0)


def _differentiated(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _per_channel(D: Tensor | None, channels: int) -> Tensor | None:
    return D if D is None or D.ndim == 2 else D[:, None].expand(-1, channels)


# ---- public ----------------------------------------------------------------------------------------------------------


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    chunk_size: int | None = None,
    *,
    dt_limit: Limits | None = None,
    state: Tensor | None = None,
    seg: Segments | None = None,
    algorithm: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t;  then y_t * silu(z_t) if z is given.

    Args:
        x: (B, L, H, P) values.
        dt: (B, L, H) step size, > 0 once bias and softplus are applied; dt = 0 leaves the state as it is.
        A: (H,) decay rate per unit of dt, < 0: the decay of one step is exp(dt A).
        B, C: (B, L, G, N) input and output directions; group g serves H / G neighbouring heads.
        D: (H,) or (H, P) skip weight. z: (B, L, H, P) gate.
        dt_bias: (H,) added to dt; dt_softplus: then softplus; dt_limit: then clamp to (low, high).
        chunk_size: length inside which the quadratic form is used, 64 if None; the result does not depend on it.
        state: (B, H, P, N) before the first position; zeros if None.
        seg: packing and padding.
        algorithm: "chunk" (default) or "recurrent" (the definition, one position at a time).
        backend: see `statewise.ops.use_backend`. "numba": float32 kernels for CPU; half precision is computed in
            float32. "triton": kernels for GPUs; half precision is multiplied as such, added up in float32, and states
            keep the digits of float32. "reference": plain PyTorch on any device, for float64.

    Returns:
        y (B, L, H, P) in x's dtype, and the state (B, H, P, N) after the last position, in float32 (float64 for
        float64 input). Differentiable in every tensor argument through both.

    Raises:
        ValueError, TypeError: naming the argument whose shape, device or dtype does not fit.

    Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), equations 15-16 and section 6.
    """
    sizes = _sizes(x, dt, A, B, C, state, D=D, z=z, dt_bias=dt_bias)
    _checks.segments("ssd", seg, sizes["B"], sizes["L"], x.device)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"ssd: chunk_size: want a positive number, got {chunk_size}")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"ssd: algorithm: want 'chunk', 'recurrent' or None, got {algorithm!r}")
    available = reasons(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state)
    if algorithm is not None:
        for name in ("numba", "triton"):
            available[name] = available[name] or f"algorithm={algorithm!r} is a form of the reference"
    chosen = resolve("ssd", available, backend)
    if chosen == "triton":
        return _on_gpu((x, dt, A, B, C, D, z, dt_bias), dt_softplus, dt_limit, chunk_size, state, seg)
    if chosen == "numba" and seg is None and not torch.compiler.is_compiling():
        parts = _stretches.count(sizes["B"] * sizes["H"], sizes["L"])
        if parts > 1:
            options: dict[str, Any] = {
                "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "chunk_size": chunk_size,
            }  # fmt: skip
            return _stretches.run(
                parts,
                partial(ssd, A=A, D=D, backend=backend, **options),
                partial(ssd_summary, A=A, D=D, **options),
                state, x=x, dt=dt, B=B, C=C, z=z,
            )  # fmt: skip
    dtype = _checks.compute_dtype(x)
    if sizes["L"] == 1 and seg is None and algorithm is None and not _deterministic.active():
        y, state = ssd_step(
            x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, None if z is None else z[:, 0], dt_bias, dt_softplus,
            dt_limit=dt_limit, state=state, backend=chosen,
        )  # fmt: skip
        return y[:, None], state
    if chosen == "numba":
        dt_ = _steps(dt, dtype, dt_bias, dt_softplus, dt_limit, seg)
        # y has the dtype of x, and before the gate it must not be rounded.
        tensors = (x if z is None else x.to(dtype), dt_, A, B, C, _per_channel(D, sizes["P"]), state)
        marks = None if seg is None else seg.marks
        # What is kept for the backward pass has a shape that would tie an exported program to a length.
        keep = _differentiated(*tensors) and not torch.compiler.is_exporting()
        kernel = _recurrent if _deterministic.active() else _forward
        y, state, _ = kernel(*tensors, marks, min(chunk_size or CHUNK, MAX_CHUNK), keep)
        return _tail(y, x, None, z, seg).to(x.dtype), state
    if state is None:
        state = x.new_zeros(sizes["B"], sizes["H"], sizes["P"], sizes["N"], dtype=dtype)
    dt_, log_a, (v, b, c), resets = _lower(dt, A, dtype, dt_bias, dt_softplus, dt_limit, seg, x, B, C)
    if seg is not None:
        state = seg.forget(state)
    if algorithm == "recurrent":
        y, state = reference.recurrent(v, dt_, log_a, b, c, state.to(dtype), resets)
    else:
        with no_autocast(x):
            y, state = reference.chunked(v, dt_, log_a, b, c, state.to(dtype), resets, chunk_size or CHUNK)
    return _tail(y, v, D, z, seg).to(x.dtype), state


def _tail(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, seg: Segments | None) -> Tensor:
    if D is not None:
        y = y + x * (D[:, None] if D.ndim == 1 else D).to(y.dtype)
    if z is not None:
        y = y * silu((z if seg is None else seg.mask(z)).to(y.dtype))
    return y


def ssd_step(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One position of `ssd`: x, z (B, H, P), dt (B, H), B and C (B, G, N), state (B, H, P, N) or None for zeros."""
    if _deterministic.active():
        y, state = ssd(
            x[:, None], dt[:, None], A, B[:, None], C[:, None], D, None if z is None else z[:, None], dt_bias,
            dt_softplus, dt_limit=dt_limit, state=state, backend=backend,
        )  # fmt: skip
        return y[:, 0], state
    dtype = _checks.compute_dtype(x)
    H = x.shape[1]
    chosen = resolve("ssd", reasons(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state), backend)
    if chosen == "triton" and not _differentiated(x, dt, A, B, C, D, z, dt_bias, state):
        low, high = dt_limit or (-math.inf, math.inf)
        return _triton_one(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, low, high)
    dt_ = step_size(dt, dtype, dt_bias, dt_softplus, dt_limit)
    if chosen == "numba":
        tensors = (x, dt_, A, B, C, _per_channel(D, x.shape[2]), state)
        if not _differentiated(*tensors):
            y, state = _one(*tensors)
            return _tail(y, x, None, z, None).to(x.dtype), state
    b, c = reference.heads(B.to(dtype), H), reference.heads(C.to(dtype), H)
    v = x.to(dtype)
    update = (dt_[..., None] * v)[..., None] * b[:, :, None]
    kept = 0 if state is None else (dt_ * A.to(dtype)).exp()[..., None, None] * state.to(dtype)
    state = kept + update
    y = (state @ c[..., None]).squeeze(-1)
    return _tail(y, v, D, z, None).to(x.dtype), state


def ssd_matrix(
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
    """(B, H, L, L): y[:, t, h] = sum_s M[:, h, t, s] x[:, s, h]. The gate z is not part of it; D must be (H,) or None.

    Source: Dao & Gu 2024, equation 16 (the 1-semiseparable mask).
    """
    sizes: dict[str, int] = {"B": dt.shape[0], "L": dt.shape[1]}
    _coefficient_sizes(dt, A, B, C, sizes)
    if D is not None:
        _checks.shape("ssd_matrix", "D", D, ("H",), sizes)
    dtype = _checks.compute_dtype(B)
    dt_, log_a, (b, c), _ = _lower(dt, A, dtype, dt_bias, dt_softplus, dt_limit, seg, B, C)
    document = None if seg is None else seg.document[:, None]
    decay = reference.decay_matrix(log_a.transpose(1, 2), document)  # (B, H, L, L)
    b, c = (reference.heads(t, sizes["H"]).transpose(1, 2) for t in (b, c))
    matrix = (c @ b.transpose(-1, -2)) * decay * dt_.transpose(1, 2)[:, :, None]
    if D is not None:
        keep = torch.ones_like(dt_) if seg is None else seg.mask(torch.ones_like(dt_))
        matrix = matrix + torch.diag_embed((D.to(dtype) * keep).transpose(1, 2))
    return matrix


def ssd_summary(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    chunk_size: int | None = None,
    *,
    dt_limit: Limits | None = None,
    seg: Segments | None = None,
) -> Summary:
    """The stretch as one element: transition (B, H, 1, 1) and state (B, H, P, N) from zero."""
    _, state = ssd(x, dt, A, B, C, None, None, dt_bias, dt_softplus, chunk_size, dt_limit=dt_limit, seg=seg)
    dtype = _checks.compute_dtype(x)
    _, log_a, _, resets = _lower(dt, A, dtype, dt_bias, dt_softplus, dt_limit, seg)
    transition = log_a.sum(1).exp()
    if resets is not None:
        transition = transition.masked_fill(resets.any(1)[:, None], 0.0)
    return Summary(transition[..., None, None], state)


def ssd_carry(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    chunk_size: int | None = None,
    *,
    dt_limit: Limits | None = None,
    state: Tensor,
    seg: Segments | None = None,
) -> Tensor:
    """What an incoming `state` adds to y (B, L, H, P) of a run from zero (gated by z if given)."""
    dtype = _checks.compute_dtype(C)
    _, log_a, (c,), resets = _lower(dt, A, dtype, dt_bias, dt_softplus, dt_limit, seg, C)
    decay = log_a.cumsum(1).exp()
    if resets is not None:
        decay = decay.masked_fill((resets.long().cumsum(1) != 0)[..., None], 0.0)
    state = state if seg is None else seg.forget(state)
    y = torch.einsum("blhn,bhpn->blhp", reference.heads(c, A.shape[0]), state.to(dtype)) * decay[..., None]
    return _tail(y if seg is None else seg.mask(y), y, None, z, seg)


SPEC = register(
    OpSpec(
        name="ssd",
        run=ssd,
        reference=partial(ssd, algorithm="recurrent"),
        step=lambda chunk_size=None, **inputs: ssd_step(**inputs),
        matrix=lambda chunk_size=None, **inputs: ssd_matrix(**inputs),
        apply=lambda matrix, x: torch.einsum("bhts,bshp->bthp", matrix, x.to(matrix.dtype)),
        summary=ssd_summary,
        carry=ssd_carry,
        value="x",
        timed=("x", "dt", "B", "C", "z"),
        tail=("z",),
        reasons=reasons,
        cases="statewise.ops.ssd.cases",
        chunk=CHUNK,
    )
)
