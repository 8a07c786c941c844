"""Softmax attention in a fixed order of keys, for `statewise.deterministic`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._fixed import product

# Queries of one stretch: bounds the memory of the scores.
_QUERIES = 256


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the keys that are seen, in float32.

    Numerator and denominator add up one key after the other. Keys that are not seen add zeros, so it does not matter
    how many there are or where they stand.

    Args:
        q: (B, H, L, P). k, v: (B, Hk, T, P). seen: (B or 1, 1, L, T) bool, with at least one key for each query.
    """
    B, H, L, P = q.shape
    T = k.shape[2]
    k, v = (t.repeat_interleave(H // t.shape[1], 1).float().reshape(B * H, T, P) for t in (k, v))
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    q = (q.float() * scale).reshape(B * H, L, P)
    parts = []
    for lo in range(0, L, _QUERIES):
        score = product(q[:, lo : lo + _QUERIES], k.mT, chain=True).unflatten(0, (B, H))
        score = score.masked_fill(~seen[:, :, lo : lo + _QUERIES], -torch.inf)
        weight = (score - score.detach().amax(-1, keepdim=True)).exp()
        parts.append(product(weight.flatten(0, 1), values, chain=True))
    y = torch.cat(parts, 1)
    return (y[..., :P] / y[..., P:]).unflatten(0, (B, H))
