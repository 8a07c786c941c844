"""Softmax attention with a key-value state, on torch's scaled_dot_product_attention."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..._tracing import transformed
from ...segments import Segments
from .. import _checks, _deterministic
from .._backend import BackendError, numba_reason, resolve
from .._spec import OpSpec, register
from . import fixed, reference
from .reference import KVBuffer, KVState

__all__ = [
    "KVBuffer",
    "KVState",
    "attention",
    "attention_apply",
    "attention_cache",
    "attention_matrix",
    "attention_positions",
    "attention_step",
]

_OP = "attention"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: KVState | KVBuffer | None = None,
    seg: Segments | None = None,
    causal: bool = True,
    window: int | None = None,
    block: int | None = None,
    scale: float | None = None,
    final_state: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, KVState | KVBuffer]:
    """y_t = sum over s of softmax_s(scale q_t . k_s) v_s, over the keys of t's own document up to t.

    Args:
        q: (B, L, H, P).
        k, v: (B, L, Hk, P), H a multiple of Hk; each key head serves H / Hk query heads side by side.
        state: keys and values that came before; None: none. A `KVState` grows with each call, a `KVBuffer` keeps its
            number of slots (see `attention_cache`).
        seg: documents and padding. Invalid tokens are not attended, give zeros, and are not stored.
        causal: False attends to later tokens of the document as well; `state` must then be None.
        window: attend only to the last `window` valid tokens, the current one included; >= 1; None: to all.
        block: with causal=False: attend only to the token's own block and to the two beside it, where each document is
            cut into blocks of so many valid tokens; >= 1; None: to all.
        scale: factor on the scores; 1 / sqrt(P) if None.
        final_state: False: whoever calls does not look at the state, and another one stands in its place.
        backend: "reference" or None. The kernels are torch's own on every device.

    Returns:
        y (B, L, H, P) in the dtype of v, and the state. Keys are stored in the dtype of the given state, or as they
        came in; the wider of the two dtypes is computed in. With a window, a growing state keeps window - 1 slots at
        most. With causal=False the state holds the keys too, but serves nothing. With a window or blocks, memory grows
        with L, not with its square.

    Raises:
        ValueError: shapes that do not fit; a `KVBuffer` that would have to drop a key that is still needed (under
            torch.compile that is a RuntimeError).

    PyTorch has second derivatives of this under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` only, which is what
    it runs as under transforms of torch.func.

    Source: Vaswani et al. 2017, section 3.2.1; grouped heads: Ainslie et al. 2023; blocks: Amos et al. 2023 (arXiv
    2310.02980), appendix, for Path-X.
    """
    _check(q, k, v, state, seg, causal, window, block)
    ordered = _deterministic.active()
    if ordered and (reason := numba_reason(q, k, v)):
        raise BackendError(f"{_OP}: inside statewise.deterministic() only a kernel on CPU serves: {reason}")
    if not ordered:
        resolve(_OP, reasons(q, k, v), backend)
    length = q.shape[1]
    state = _empty(k) if state is None else state
    if seg is not None:
        q, k, v = seg.mask(q), seg.mask(k), seg.mask(v)
    where = reference.layout(seg, block is not None)
    position = _advance(state.position, seg, length)
    q, k, v = (reference.reorder(t, where.order) for t in (q, k, v))
    line, new = reference.append(state, k, v), state
    if final_state:
        new, lost = reference.push(state, line, where, length, position, window)
        if isinstance(state, KVBuffer):
            _refuse(lost, state.k.shape[1])
    if length == 0:
        return q.to(v.dtype), new

    held = state.k.shape[1]
    # A cache that is kept more exactly than the inputs is not rounded on every call: that costs a copy of all of it.
    dtype, wide = v.dtype, torch.promote_types(v.dtype, state.k.dtype) if held else v.dtype
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if held:
        k, v = line if wide == state.k.dtype else reference.append(state, k, v, wide)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    sight = reference.Sight(causal, window, block)
    masked = ordered or held > 0 or seg is not None or not reference.all_seen(sight, length)
    parts = []
    for queries, keys in reference.stretches(sight, held, length, seg is not None):
        seen = None
        if masked:
            seen = reference.mask(sight, queries, keys, state.live if held else None, where, q.device)[:, None]
        own = (q[:, :, slice(*queries)], k[:, :, slice(*keys)], v[:, :, slice(*keys)])
        parts.append(_attend(*own, seen, causal and not masked, scale, ordered))
    y = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
    y = y.transpose(1, 2).to(dtype)
    y = reference.restore(y, where.order)
    return (y if seg is None else seg.mask(y)), new


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, is_causal: bool, scale: float | None, ordered: bool
) -> Tensor:
    """Heads first: q (B, H, L, P), k and v (B, Hk, T, P), seen (B or 1, 1, L, T) or None."""
    if ordered and seen is not None:
        return fixed.attend(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale)
    # The fused kernels have no rules for vmap, and no derivatives forward.
    with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():
        return scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def reasons(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> dict[str, str | None]:
    """The only back-end is the reference, which calls torch's kernels."""
    return {"reference": None}


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: KVState | KVBuffer | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, KVState | KVBuffer]:
    """One token of `attention`: q (B, H, P), k and v (B, Hk, P). Returns (y (B, H, P), state)."""
    y, state = attention(q[:, None], k[:, None], v[:, None], state=state, window=window, scale=scale)
    return y[:, 0], state


def attention_matrix(
    q: Tensor,
    k: Tensor,
    *,
    seg: Segments | None = None,
    causal: bool = True,
    window: int | None = None,
    block: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The softmax weights (B, H, L, L): entry [t, s] is the weight of value s in output t. Rows of padding are zero.

    Arguments as in `attention`. Memory grows with L squared.
    """
    _check(q, k, k, None, seg, causal, window, block)
    length = q.shape[1]
    dtype = _checks.compute_dtype(k)
    q, k = q.to(dtype), k.to(dtype)
    if seg is not None:
        q, k = seg.mask(q), seg.mask(k)
    where = reference.layout(seg, block is not None)
    q, k = reference.reorder(q, where.order), reference.reorder(k, where.order)
    seen = reference.mask(reference.Sight(causal, window, block), (0, length), (0, length), None, where, q.device)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    score = torch.einsum("bthp,bshp->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    dense = score.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    if where.order is not None:
        # Back to the places where the tokens stood: rows, then columns.
        at = torch.argsort(where.order, 1)[:, None]
        dense = dense.gather(2, at[..., None].expand_as(dense)).gather(3, at[:, :, None].expand_as(dense))
    if seg is not None and seg.valid is not None:
        dense = dense.masked_fill(~(seg.valid[:, None, :, None] & seg.valid[:, None, None, :]), 0)
    return dense


def attention_apply(matrix: Tensor, v: Tensor) -> Tensor:
    """`matrix` (B, H, L, L) times v (B, L, Hk, P), each value head for its H / Hk rows of heads."""
    v = v.repeat_interleave(matrix.shape[1] // v.shape[2], 2)
    return torch.einsum("bhts,bshp->bthp", matrix, v)


def attention_positions(
    state: KVState | KVBuffer | None, seg: Segments | None, batch: int, length: int, device: torch.device | str | None
) -> Tensor:
    """(B, L) int64: the position of each token in its document, for rotary embeddings.

    Counted in valid tokens: a document that starts in this stretch counts from 0, the one under way goes on from the
    state (from 0 if there is none). So padding, wherever it stands, moves nothing.
    """
    position = torch.zeros(batch, dtype=torch.int64, device=device) if state is None else state.position
    if length == 0:
        return position.new_zeros(batch, 0)
    if seg is None:
        return position[:, None] + torch.arange(length, device=position.device)
    return reference.ranks(position, seg)[0]


def attention_cache(
    batch: int,
    n_kv_heads: int,
    head_dim: int,
    *,
    capacity: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> KVState | KVBuffer:
    """An empty state. `capacity` None: a `KVState` that grows; a number: a `KVBuffer` of that many slots."""
    if capacity is not None and capacity < 1:
        raise ValueError(f"attention_cache: capacity: want at least 1 token, or None to grow, got {capacity}")
    held = 0 if capacity is None else capacity
    return (KVState if capacity is None else KVBuffer)(
        torch.zeros(batch, held, n_kv_heads, head_dim, device=device, dtype=dtype),
        torch.zeros(batch, held, n_kv_heads, head_dim, device=device, dtype=dtype),
        torch.zeros(batch, held, device=device, dtype=torch.bool),
        torch.zeros(batch, device=device, dtype=torch.int64),
    )


# ---- inside --------------------------------------------------------------------------------------------------------


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: KVState | KVBuffer | None,
    seg: Segments | None,
    causal: bool,
    window: int | None,
    block: int | None,
) -> None:
    sizes: dict[str, int] = {}
    _checks.shape(_OP, "q", q, ("B", "L", "H", "P"), sizes)
    _checks.shape(_OP, "k", k, ("B", "L", "Hk", "P"), sizes)
    _checks.shape(_OP, "v", v, ("B", "L", "Hk", "P"), sizes)
    if sizes["Hk"] == 0 or sizes["H"] % sizes["Hk"]:
        raise ValueError(f"{_OP}: q: want a multiple of the {sizes['Hk']} key heads, got {sizes['H']} heads")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not t.is_floating_point():
            raise TypeError(f"{_OP}: {name}: want a real floating tensor, got {t.dtype}")
    _checks.same_kind(_OP, ("v", v), q=q, k=k)
    _checks.segments(_OP, seg, sizes["B"], sizes["L"], q.device)
    for name, size in (("window", window), ("block", block)):
        if size is not None and size < 1:
            raise ValueError(f"{_OP}: {name}: want at least 1 token, got {size}")
    if causal and block is not None:
        raise ValueError(f"{_OP}: block: want causal=False with it, or a window instead, got causal=True")
    if not causal and (state is not None or window is not None):
        raise ValueError(f"{_OP}: causal: want True with a state or a window, got False")
    if state is None:
        return
    if not isinstance(state, (KVState, KVBuffer)):
        raise TypeError(f"{_OP}: state: want a KVState, a KVBuffer or None, got {type(state).__name__}")
    _checks.shape(_OP, "state.k", state.k, ("B", "T", "Hk", "P"), sizes)
    _checks.shape(_OP, "state.v", state.v, ("B", "T", "Hk", "P"), sizes)
    _checks.shape(_OP, "state.live", state.live, ("B", "T"), sizes)
    _checks.shape(_OP, "state.position", state.position, ("B",), sizes)
    if state.k.device != q.device:
        raise ValueError(f"{_OP}: state is on {state.k.device} but q on {q.device}; move one of them")


def _empty(k: Tensor) -> KVState:
    none = k.new_zeros(k.shape[0], 0, *k.shape[2:])
    return KVState(
        none,
        none.clone(),
        torch.zeros(k.shape[0], 0, dtype=torch.bool, device=k.device),
        torch.zeros(k.shape[0], dtype=torch.int64, device=k.device),
    )


def _advance(position: Tensor, seg: Segments | None, length: int) -> Tensor:
    if length == 0:
        return position
    return position + length if seg is None else reference.ranks(position, seg)[1]


def _refuse(lost: Tensor, capacity: int) -> None:
    """Raise if a key that is still needed fell out of a buffer."""
    if lost.shape[1] == 0:
        return
    message = (
        f"{_OP}: state: a buffer of capacity {capacity} is full and would drop keys that are still attended to; make "
        "it with a larger capacity, or with capacity=None to let it grow"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(~lost.any(), message)
    elif bool(lost.any()):
        raise ValueError(message)


register(
    OpSpec(
        name=_OP,
        run=attention,
        reference=attention,
        value="v",
        timed=("q", "k", "v"),
        reasons=reasons,
        cases="statewise.ops.attention.cases",
        step=attention_step,
        matrix=attention_matrix,
        apply=attention_apply,
    )
)
