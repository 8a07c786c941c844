"""Closed forms of the diagonal recurrence in matrix products and Fourier transforms. No (B, L, D, N) tensor is made.

Every form runs from a zero state over a full row; what the incoming state adds is computed on its own (`from_state`),
so that padding, which must not age a state, is dealt with in one place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._tracing import transformed
from .convolution import convolve
from .modes import all_powers, dot_parts, parts, steps, whole
from .moments import moments
from .reference import powers
from .vandermonde import vandermonde

CHUNK = 64


def _one(like: Tensor) -> Tensor:
    return torch.ones(1, dtype=torch.int64, device=like.device)


def from_state(log_a: Tensor, c: Tensor, state: Tensor, length: int) -> Tensor:
    """What a state adds to the next outputs: c a^(t+1) h, (B, D, length)."""
    return vandermonde(log_a, c * powers(log_a, _one(log_a)).squeeze(-2) * state, length)


def fft(u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, final_state: bool = True) -> tuple[Tensor, Tensor]:
    """u (B, L, D) from a zero state -> y (B, L, D), last state. One document a row, no padding.

    Where the last state is not wanted, anything is in its place.
    """
    y = convolve(u.mT, vandermonde(log_a, c * b, u.shape[1])).mT
    return y, b * moments(u, log_a) if final_state else b.new_empty(len(u), *b.shape)


def _toeplitz(kernel: Tensor, size: int, shift: int = 0) -> Tensor:
    """T[s, t] = kernel[shift + t - s], zero where that index is negative; kernel (D, K) -> (D, size, size)."""
    at = steps(size, kernel)
    lag = shift + at - at.unsqueeze(1)
    return kernel[:, lag.clamp(min=0)] * (lag >= 0)


def _inside(u: Tensor, kernel: Tensor, document: Tensor) -> Tensor:
    """Convolution inside chunks, per document: u (D, M, Q), document (M, Q) -> (D, M, Q).

    Documents are runs, so what the left half of a block sends to its right half can only be the document that is
    under way at the cut. Halving again and again leaves plain matrix products between two masks.
    """
    Q = u.shape[-1]
    y = u * kernel[:, :1, None]
    half = Q // 2
    while half:
        blocks = (Q // (2 * half), 2, half)
        halves, ids = u.unflatten(-1, blocks), document.unflatten(-1, blocks)
        under_way = ids[..., 0, -1:]
        sent = halves[..., 0, :] * (ids[..., 0, :] == under_way)
        weights = _toeplitz(kernel, half, half)
        received = (sent.flatten(1, 2) @ weights).view(sent.shape) * (ids[..., 1, :] == under_way)
        y = y + F.pad(received.unsqueeze(-2), (0, 0, 1, 0)).flatten(-3)
        half //= 2
    return y


def _inside_chunks(u: Tensor, kernel: Tensor, document: Tensor | None) -> Tensor:
    """As `_inside`; chunks that hold a single document (document None: all) take one dense matrix product."""
    if document is not None and (torch.compiler.is_compiling() or transformed()):
        return _inside(u, kernel, document)  # which chunks are mixed is data, and shapes may not depend on data
    y = u @ _toeplitz(kernel, u.shape[-1])
    if document is None:
        return y
    mixed = (document[:, 0] != document[:, -1]).nonzero().squeeze(1)
    return y.index_copy(1, mixed, _inside(u[:, mixed], kernel, document[mixed])) if len(mixed) else y


def chunk_size(length: int) -> int:
    """Tokens of a chunk."""
    return min(CHUNK, 1 << max(length - 1, 0).bit_length())


def chunk(u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, document: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """u (B, L, D) from a zero state -> y (B, L, D), last state (B, D, N); `document` as in `in_chunks`."""
    size, is_complex = chunk_size(u.shape[1]), b.is_complex()
    a = all_powers(log_a, size)
    inject, emit = parts(a.flip(1) * b.unsqueeze(-2)), a * (c * powers(log_a, _one(u)).squeeze(-2)).unsqueeze(-2)
    decay = powers(log_a, _one(u) * size)  # (D, 1, N)
    y, last = in_chunks(
        u, vandermonde(log_a, c * b, size), inject, dot_parts(emit),
        lambda h: parts(decay * whole(h, is_complex)), document,
    )  # fmt: skip
    return y, whole(last, is_complex).transpose(0, 1)


def in_chunks(
    u: Tensor, kernel: Tensor, inject: Tensor, emit: Tensor, advance: Callable[[Tensor], Tensor],
    document: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A time-invariant system from a zero state: matrix products inside chunks, states between them.

    Args:
        u: (B, L, D).
        kernel: (D, size), the first taps of the impulse response.
        inject: (D, size, M), row j: what the token at place j of a chunk leaves in the state at the chunk's end.
        emit: (D, size, M), row j: what the state before a chunk adds to the output at place j.
        advance: states (D, B, M) over one chunk without input.
        document: (B, L) integers that do not fall along a row; a change ends a document. None: one a row.

    Returns:
        y (B, L, D) and the last state (D, B, M).
    """
    (B, length, D), size = u.shape, kernel.shape[-1]
    chunks = -(-length // size)
    pad = chunks * size - length
    u = F.pad(u.permute(2, 0, 1), (pad, 0)).reshape(D, B * chunks, size)
    keep = None
    if document is not None:
        document = F.pad(document, (pad, 0)).view(B, chunks, size)
        last = document[..., -1:]
        before = F.pad(last[:, :-1], (0, 0, 1, 0))
        keep = last == before
        sent = u * (document == last).flatten(0, 1)
        document, before = document.flatten(0, 1), before.flatten(0, 1)
    y = _inside_chunks(u, kernel, document)
    states = ((u if document is None else sent) @ inject).unflatten(1, (B, chunks))
    entering = [torch.zeros_like(states[:, :, 0])]
    for q, arriving in enumerate(states.unbind(2)):
        carried = advance(entering[-1])
        entering.append(arriving + (carried if keep is None else carried * keep[:, q]))
    if chunks > 1:
        history = torch.stack(entering[:-1], 2).flatten(1, 2)
        late = history @ emit.mT
        y = y + (late if document is None else late * (document == before))
    return y.view(D, B, chunks * size)[..., pad:].permute(1, 2, 0), entering[-1]
