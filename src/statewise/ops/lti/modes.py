"""What closed forms share: complex modes as pairs of real numbers, and powers of modes for a row cut into chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import powers


def parts(x: Tensor) -> Tensor:
    """(..., N) complex as (..., 2 N) real; real tensors stay."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def whole(x: Tensor, is_complex: bool = True) -> Tensor:
    """The inverse of `parts`."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) if is_complex else x


def dot_parts(x: Tensor) -> Tensor:
    """As `parts`, such that parts(h) . dot_parts(x) = Re(sum h x)."""
    # Not by `conj`, which PyTorch puts off, and then vmap cannot take the imaginary part of a gradient.
    return parts(torch.conj_physical(x)) if x.is_complex() else x


def steps(n: int, like: Tensor) -> Tensor:
    """0 ... n - 1, where `like` is."""
    return torch.arange(n, device=like.device)


def split(length: int) -> tuple[int, int]:
    """Q, a power of two near sqrt(length), and how many chunks of Q cover the length."""
    Q = 1 << ((max(length, 1) - 1).bit_length() + 1) // 2
    return Q, -(-length // Q)


def all_powers(log_a: Tensor, n: int) -> Tensor:
    """a^0 ... a^(n-1), (D, n, N), from about 2 sqrt(n) exponentials."""
    Q, chunks = split(n)
    coarse, fine = powers(log_a, steps(chunks, log_a) * Q), powers(log_a, steps(Q, log_a))
    return (coarse.unsqueeze(2) * fine.unsqueeze(1)).flatten(1, 2)[:, :n]
