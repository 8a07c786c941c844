"""The stages of a chunked SSD scan up to the state of each chunk, in plain PyTorch.

`statewise.ops.ssd` does not go through them; they are here for code that builds its own scan from them.
Shapes: B and x (B, L, ...), dt and its running sums (B, H, C, Q) with C chunks of Q positions, padded with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from ......ops._dt import step_size
from ......ops.ssd.reference import heads
from ...._adapt import UNLIMITED
from ...._missing import missing

__all__ = ["chunk_state", "chunk_state_ref", "chunk_state_varlen"]

__getattr__ = missing(__name__)


def into_chunks(t: Tensor, size: int) -> Tensor:
    """(B, L, ...) -> (B, C, Q, ...), padded with zeros on the right."""
    extra = -t.shape[1] % size
    t = pad(t, (0, 0) * (t.ndim - 2) + (0, extra)) if extra else t
    return t.unflatten(1, (-1, size))


def last_index(seq_idx: Tensor, size: int) -> Tensor:
    """(B, C): the document of the last position of each chunk; the last chunk may be shorter."""
    length = seq_idx.shape[1]
    ends = torch.arange(size, length + size, size, device=seq_idx.device)[: math.ceil(length / size)] - 1
    return seq_idx[:, ends.clamp(max=length - 1)]


def _chunk_cumsum_fwd(
    dt: Tensor, A: Tensor, chunk_size: int, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: Sequence[float] = UNLIMITED,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Running sums of dt A inside each chunk, and dt after bias, softplus and limits; both (B, H, C, Q), float32."""
    dtype = torch.promote_types(dt.dtype, torch.float32)
    steps = step_size(dt, dtype, dt_bias, dt_softplus, (float(dt_limit[0]), float(dt_limit[1])))
    steps = into_chunks(steps, chunk_size).permute(0, 3, 1, 2)
    return (steps * A.to(dtype)[:, None, None]).cumsum(-1), steps


def _chunk_state_fwd(
    B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, seq_idx: Tensor | None = None, states: Tensor | None = None,
    states_in_fp32: bool = True,
) -> Tensor:  # fmt: skip
    """What each chunk leaves behind from zero, (B, C, H, P, N); of a chunk with several documents, its last one."""
    size = dt.shape[-1]
    weight = (dA_cumsum[..., -1:] - dA_cumsum).exp() * dt  # (B, H, C, Q)
    if seq_idx is not None:
        mine = into_chunks(seq_idx + 1, size) == (last_index(seq_idx, size) + 1)[..., None]
        weight = weight * mine[:, None]
    b = heads(into_chunks(B, size).to(weight.dtype), x.shape[2])  # (B, C, Q, H, N)
    v = into_chunks(x, size).to(weight.dtype) * weight.permute(0, 2, 3, 1)[..., None]
    found = torch.einsum("bcqhp,bcqhn->bchpn", v, b)
    found = found if states_in_fp32 else found.to(B.dtype)
    return found if states is None else states.copy_(found)


def chunk_state(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, states_in_fp32: bool = True) -> Tensor:
    """What each chunk leaves behind from zero: B (B, L, G, N), x (B, L, H, P) to (B, C, H, P, N)."""
    return _chunk_state_fwd(B, x, dt, dA_cumsum, states_in_fp32=states_in_fp32)


def chunk_state_ref(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor) -> Tensor:
    """The same, in the dtype of x."""
    return _chunk_state_fwd(B, x, dt, dA_cumsum).to(x.dtype)


def chunk_state_varlen(
    B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, cu_seqlens: Tensor, chunk_states: Tensor
) -> Tensor:
    """The state (S, H, P, N) after each sequence of one row.

    Args:
        B: (L, G, N). x: (L, H, P). dt, dA_cumsum: (H, C, Q).
        cu_seqlens: (S + 1,) where sequences begin, and where the last one ends.
        chunk_states: (C, H, P, N), the state with which each chunk is entered.
    """
    size = dt.shape[-1]
    borders = cu_seqlens.tolist()
    states = []
    for start, end in pairwise(borders):
        if start == end:
            states.append(torch.zeros_like(chunk_states[0]))
            continue
        chunk = (end - 1) // size
        begin = max(start, chunk * size)
        inside = slice(begin - chunk * size, end - chunk * size)
        total = dA_cumsum[:, chunk, inside.stop - 1]
        weight = (total[:, None] - dA_cumsum[:, chunk, inside]).exp() * dt[:, chunk, inside]  # (H, q)
        v = x[begin:end].to(weight.dtype) * weight.t()[..., None]
        state = torch.einsum("qhp,qhn->hpn", v, heads(B[begin:end].to(weight.dtype), x.shape[1]))
        if start < chunk * size:
            state = state + total.exp()[:, None, None] * chunk_states[chunk].to(state.dtype)
        states.append(state.to(chunk_states.dtype))
    return torch.stack(states)
