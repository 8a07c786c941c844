"""The short depthwise causal convolution in front of a state space core."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...segments import Segments
from .. import _checks
from .._backend import numba_reason, resolve, triton_reason
from .._deterministic import token_apart
from .._register import TRITON, operator, recomputing
from .._spec import OpSpec, register
from . import reference

__all__ = [
    "ConvSummary",
    "short_conv",
    "short_conv_apply",
    "short_conv_combine",
    "short_conv_matrix",
    "short_conv_step",
    "short_conv_summary",
]

_OP = "short_conv"
ACTIVATIONS = (None, "silu")
MAX_WIDTH = 8


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    state: Tensor | None = None,
    seg: Segments | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution: y_t = act(bias + sum over k < K of weight[:, K-1-k] x_{t-k}).

    The window holds the last K valid tokens of the token's own document: padding is skipped wherever it stands, and
    before the start of a document there are zeros.

    Args:
        x: (B, L, D).
        weight: (D, K), K from 1 to 8; the last column acts on the current token (the layout of torch's conv1d with
            the middle axis dropped).
        bias: (D,) or None.
        activation: None or "silu".
        state: (B, K-1, D), the last K-1 valid inputs, oldest first; zeros if None.
        seg: documents and padding.
        backend: "numba" (float32 on CPU), "triton" (GPUs, added up in float32), "reference", or None.

    Returns:
        y (B, L, D) in the dtype of x, and the state (B, K-1, D) after the last token, in the dtype that was computed
        in (float32 for half-precision inputs): the last K-1 valid inputs of the document under way, zero where it is
        younger than that.

    Raises:
        ValueError: shapes that do not fit, K outside 1 ... 8, an unknown activation.
        TypeError: dtypes that do not go together, complex inputs.
        BackendError: the back-end asked for cannot serve.

    Source: Mamba (Gu and Dao 2023, section 3.4) and, before it, H3 (Fu et al. 2022, section 3.1).
    """
    _check(x, weight, bias, activation, state, seg)
    if backend is None and seg is None and x.shape[1] == 1 and x.device.type == "cpu" and token_apart():
        # Decode: one token costs less than the way to the kernel.
        y, state = short_conv_step(x.squeeze(1), weight, bias, activation, state)
        return y.unsqueeze(1), state
    dtype = _checks.compute_dtype(x)
    chosen = resolve(_OP, reasons(x, weight, bias, activation, state=state), backend)
    if chosen == "triton":
        if seg is None and x.shape[1] == 1 and not torch.is_grad_enabled():
            y, state = _triton_one(x.squeeze(1), weight, bias, state, activation == "silu")
            return y.unsqueeze(1), state
        return _triton_forward(x, weight, bias, state, None if seg is None else seg.marks, activation == "silu")
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    state = None if state is None else state.to(dtype)
    if chosen == "numba":
        marks = None if seg is None else seg.marks
        y, state = _forward(x, weight, bias, state, marks, activation == "silu")
    else:
        y, state = reference.short_conv(x.to(dtype), weight, bias, activation, state=state, seg=seg)
    return y.to(x.dtype), state


def reasons(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    state: Tensor | None = None,
    **_: Any,
) -> dict[str, str | None]:
    """For each back-end, None if it serves these inputs and else why not."""
    tensors = (x, weight, bias, state)
    return {"numba": numba_reason(*tensors), "triton": triton_reason(*tensors), "reference": None}


def short_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `short_conv`: x (B, D), state (B, K-1, D) or None. Returns (y (B, D), state (B, K-1, D))."""
    dtype = _checks.compute_dtype(x)
    token = x.to(dtype).unsqueeze(1)
    if state is None:
        state = token.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[1])
    window = torch.cat([state.to(dtype), token], 1)
    y = (window * weight.to(dtype).t()).sum(1)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = silu(y)
    return y.to(x.dtype), window[:, 1:]


def short_conv_matrix(
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    length: int | None = None,
    seg: Segments | None = None,
) -> Tensor:
    """The convolution as one banded matrix per channel, (B, D, L, L), B = 1 without `seg`.

    With a bias or an activation the map is not linear, so both must be None.

    Args:
        weight: (D, K).
        length: L, needed without `seg`.
    """
    if bias is not None or activation is not None:
        raise ValueError(
            "short_conv_matrix: bias, activation: want None, since a matrix holds the linear part only; got "
            f"bias {None if bias is None else tuple(bias.shape)}, activation {activation!r}"
        )
    if length is None:
        if seg is None:
            raise ValueError("short_conv_matrix: length: want L when seg is None, got None")
        length = seg.shape[1]
    if seg is not None and seg.shape[1] != length:
        raise ValueError(f"short_conv_matrix: length: seg has {seg.shape[1]} tokens, got length={length}")
    return reference.short_conv_matrix(weight, length, seg=seg)


def short_conv_apply(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix` (B, D, L, L) times x (B, L, D)."""
    return torch.einsum("bdts,bsd->btd", matrix.expand(x.shape[0], *matrix.shape[1:]), x)


class ConvSummary(NamedTuple):
    """What a stretch of tokens does to the state of a short convolution.

    Args:
        state: (B, K-1, D), the state after the stretch as far as the stretch itself determines it; zeros elsewhere.
        taken: (B,) int64, how many of the newest K-1 slots it determines: all of them if a document starts in it.
    """

    state: Tensor
    taken: Tensor


def short_conv_summary(x: Tensor, width: int, *, seg: Segments | None = None) -> ConvSummary:
    """Summary of a stretch x (B, L, D) for a convolution of K = `width` taps.

    A state (B, K-1, D) is itself the summary of all that came before: `ConvSummary(state, full((B,), K-1))`. Folding
    summaries with `short_conv_combine` gives the state with which each shard of a long sequence must start.
    """
    if x.ndim != 3:
        raise ValueError(f"short_conv_summary: x: want (B, L, D), got {tuple(x.shape)}")
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"short_conv_summary: width: want 1 to {MAX_WIDTH}, got {width}")
    _checks.segments("short_conv_summary", seg, x.shape[0], x.shape[1], x.device)
    x = x.to(_checks.compute_dtype(x))
    # The state does not depend on the weights; only its window length does.
    state = reference.short_conv(x, x.new_zeros(x.shape[2], width), seg=seg)[1]
    if seg is None:
        taken = torch.full((x.shape[0],), min(x.shape[1], width - 1), device=x.device)
    else:
        valid = torch.ones_like(seg.resets) if seg.valid is None else seg.valid
        taken = torch.where(seg.resets.any(1), width - 1, valid.sum(1).clamp(max=width - 1))
    return ConvSummary(state, taken)


def short_conv_combine(first: ConvSummary, second: ConvSummary) -> ConvSummary:
    """The summary of `first` followed by `second` (associative)."""
    slots = first.state.shape[1]
    if slots == 0:
        return second
    at = torch.arange(slots, device=first.state.device)[None] + second.taken[:, None]
    shifted = first.state.gather(1, at.clamp(max=slots - 1).unsqueeze(-1).expand_as(first.state))
    state = torch.where((at < slots).unsqueeze(-1), shifted, second.state)
    return ConvSummary(state, (first.taken + second.taken).clamp(max=slots))


# ---- checks and the paths to the kernels -------------------------------------------------------------------------


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    seg: Segments | None,
) -> None:
    sizes: dict[str, int] = {}
    _checks.shape(_OP, "x", x, ("B", "L", "D"), sizes)
    _checks.shape(_OP, "weight", weight, ("D", "K"), sizes)
    if not 1 <= sizes["K"] <= MAX_WIDTH:
        raise ValueError(f"{_OP}: weight: want (D, K) with K from 1 to {MAX_WIDTH}, got {tuple(weight.shape)}")
    if bias is not None:
        _checks.shape(_OP, "bias", bias, ("D",), sizes)
    if state is not None:
        _checks.shape(_OP, "state", state, ("B", sizes["K"] - 1, "D"), sizes)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_OP}: activation: want None or 'silu', got {activation!r}")
    for name, t in (("x", x), ("weight", weight), ("bias", bias), ("state", state)):
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{_OP}: {name}: want a real floating tensor, got {t.dtype}")
    _checks.same_kind(_OP, ("x", x), weight=weight, bias=bias, state=state)
    _checks.segments(_OP, seg, x.shape[0], x.shape[1], x.device)


def _fake(x, weight, bias, state, marks, silu):
    batch, _, width = x.shape
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(batch, weight.shape[1] - 1, width, dtype=torch.float32),
    )


def _definition(x, weight, bias, state, marks, silu):
    seg = Segments.from_marks(marks)
    return short_conv(x, weight, bias, "silu" if silu else None, state=state, seg=seg, backend="reference")


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? state"
_forward = recomputing(
    "short_conv", f"{_INPUTS}, Tensor? marks, bool silu", 2, "statewise.ops.short_conv.numba", _fake, _definition,
    gradients=4,
)  # fmt: skip
_triton_forward = recomputing(
    "short_conv_triton", f"{_INPUTS}, Tensor? marks, bool silu", 2, "statewise.ops.short_conv.triton", _fake,
    _definition, gradients=4, device=TRITON,
)  # fmt: skip
_triton_one = operator(
    f"short_conv_triton_step({_INPUTS}, bool silu) -> (Tensor, Tensor)",
    "statewise.ops.short_conv.triton:step",
    lambda x, weight, bias, state, silu: (
        x.new_empty(x.shape),
        x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[1]), dtype=torch.float32),
    ),
    device=TRITON,
)


register(
    OpSpec(
        name=_OP,
        run=short_conv,
        reference=partial(short_conv, backend="reference"),
        value="x",
        timed=("x",),
        reasons=reasons,
        cases="statewise.ops.short_conv.cases",
        step=short_conv_step,
    )
)
