"""SSD in plain PyTorch: the recurrence, and the chunked form in matrix products that trains at speed on any device.

Shapes: x (B, L, H, P), log_a and dt (B, L, H), b and c (B, L, G, N), state (B, H, P, N); all in the compute dtype,
with invalid positions already neutral (x = 0, b = c = 0, dt = 0, log_a = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def heads(t: Tensor, n_heads: int) -> Tensor:
    """(..., G, N) -> (..., H, N): each group serves H / G neighbouring heads."""
    return t.repeat_interleave(n_heads // t.shape[-2], dim=-2)


def recurrent(
    x: Tensor, dt: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition: S_t = exp(log_a_t) S_{t-1} + dt_t x_t b_t^T, y_t = S_t c_t, one position at a time."""
    H = x.shape[2]
    a = log_a.exp()
    if resets is not None:
        a = a.masked_fill(resets[..., None], 0.0)
    b, c = heads(b, H), heads(c, H)
    ys = []
    for t in range(x.shape[1]):
        update = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = a[:, t, :, None, None] * state + update
        ys.append((state * c[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return y, state


def decay_matrix(log_a: Tensor, document: Tensor | None) -> Tensor:
    """(..., Q) log decays -> (..., Q, Q) lower triangular: entry (i, j) = exp(sum of log_a over j+1..i).

    Entries across documents (`document` broadcasts like log_a) are zero. Each stretch is summed on its own, by one
    matrix product with a triangle of ones. The usual difference of two running sums cancels, in the value and, worse,
    in the gradient of log_a, which it makes wrong in the fourth digit where decay is fast.
    """
    Q = log_a.shape[-1]
    lower = torch.ones(Q, Q, dtype=log_a.dtype, device=log_a.device).tril()
    log_decay = lower @ (log_a[..., :, None] * lower.tril(-1))
    keep = lower.bool()
    if document is not None:
        keep = keep & (document[..., :, None] == document[..., None, :])
    return log_decay.masked_fill(~keep, -torch.inf).exp()


def chunked(
    x: Tensor,
    dt: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    resets: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The same in matrix products: quadratic inside chunks of `chunk_size`, states between them.

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 6.
    """
    B, L, H, P = x.shape
    G, N = b.shape[2:]
    R, Q = H // G, max(1, min(chunk_size, L))
    K = -(-L // Q)
    if L == 0:
        return torch.zeros_like(x), state
    v = x * dt[..., None]
    if K * Q != L:  # padding with zeros is neutral: decay 1, no input
        extra = K * Q - L
        v, b, c = (pad(t, (0, 0, 0, 0, 0, extra)) for t in (v, b, c))
        log_a = pad(log_a, (0, 0, 0, extra))
        resets = None if resets is None else pad(resets, (0, extra))

    v = v.reshape(B, K, Q, G, R, P).permute(0, 1, 3, 4, 2, 5)  # (B, K, G, R, Q, P)
    b = b.reshape(B, K, Q, G, N).transpose(2, 3)  # (B, K, G, Q, N)
    c = c.reshape(B, K, Q, G, N).transpose(2, 3)
    log_a = log_a.reshape(B, K, Q, G, R).permute(0, 1, 3, 4, 2)  # (B, K, G, R, Q)
    document = None
    if resets is not None:
        document = resets.reshape(B, K, Q).long().cumsum(-1)[:, :, None, None]  # (B, K, 1, 1, Q)

    decay = decay_matrix(log_a, document)  # (B, K, G, R, Q, Q)
    scores = (c @ b.transpose(-1, -2))[:, :, :, None] * decay
    y = scores @ v  # (B, K, G, R, Q, P)

    from_start = log_a.cumsum(-1).exp()  # decay of the incoming state
    if document is not None:
        from_start = from_start.masked_fill(document != 0, 0.0)
    to_end = decay[..., -1, :]
    added = (v * to_end[..., None]).transpose(-1, -2).reshape(B, K, G, R * P, Q) @ b  # (B, K, G, R P, N)
    added = added.reshape(B, K, H, P, N)
    through = from_start[..., -1].reshape(B, K, H, 1, 1)

    incoming = []
    for k in range(K):
        incoming.append(state)
        state = through[:, k] * state + added[:, k]
    entering = torch.stack(incoming, 1).reshape(B, K, G, R * P, N)
    carried = (c @ entering.transpose(-1, -2)).reshape(B, K, G, Q, R, P).transpose(3, 4)
    y = y + from_start[..., None] * carried
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(B, K * Q, H, P)
    return y[:, :L], state
