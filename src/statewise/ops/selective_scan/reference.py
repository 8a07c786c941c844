"""The selective scan in plain PyTorch: the definition, and a chunked form with about 2 sqrt(L) sequential steps.

Shapes: x and dt (B, L, D), A (D, N), b and c (B, L, D, N) or anything that broadcasts to it, state (B, D, N); all in
the compute dtype (b, c, A and state may be complex), with invalid positions already neutral (x = dt = b = c = 0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def read(h: Tensor, c: Tensor) -> Tensor:
    """sum_n c h; for complex systems twice the real part, because each stored mode stands for a conjugate pair."""
    y = (h * c).sum(-1)
    return 2 * y.real if y.is_complex() else y


def recurrent(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition: h_t = exp(dt_t A) h_{t-1} + dt_t b_t x_t, y_t = c_t h_t, one position at a time."""
    ys = []
    for t in range(x.shape[1]):
        a = (dt[:, t, :, None] * A).exp()
        if resets is not None:
            a = a.masked_fill(resets[:, t, None, None], 0.0)
        state = a * state + (dt[:, t] * x[:, t])[..., None] * b[:, t]
        ys.append(read(state, c[:, t]))
    return (torch.stack(ys, 1) if ys else torch.zeros_like(x)), state


def chunked(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All chunks of about sqrt(L) positions advance together from zero; a second, short loop carries the states.

    Holds (B, L, D, N) numbers: the fast kernels do not.
    """
    L = x.shape[1]
    if L == 0:
        return torch.zeros_like(x), state
    Q = max(1, math.isqrt(L))
    K = -(-L // Q)
    extra = K * Q - L

    def split(t: Tensor) -> Tensor:
        t = pad(t, (0, 0) * (t.ndim - 2) + (0, extra)) if extra else t
        return t.reshape(t.shape[0], K, Q, *t.shape[2:])

    x, dt, b, c = split(x), split(dt), split(b), split(c)
    a = (dt[..., None] * A).exp()  # (B, K, Q, D, N)
    if resets is not None:
        a = a.masked_fill(split(resets)[..., None, None], 0.0)
    v = (dt * x)[..., None] * b
    h, through = v[:, :, 0], a[:, :, 0]
    inside, decay = [h], [through]
    for i in range(1, Q):
        h = a[:, :, i] * h + v[:, :, i]
        through = a[:, :, i] * through
        inside.append(h)
        decay.append(through)
    incoming = []
    for k in range(K):
        incoming.append(state)
        state = through[:, k] * state + h[:, k]
    entering = torch.stack(incoming, 1)
    hs = [own + d * entering for own, d in zip(inside, decay)]
    y = torch.stack([read(h, c[:, :, i]) for i, h in enumerate(hs)], 2)
    return y.reshape(y.shape[0], K * Q, -1)[:, :L], state
