"""The outputs of each chunk from its positions and the state before it, in plain PyTorch (see `ssd_chunk_state`)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from ......ops.ssd.reference import decay_matrix, heads
from ...._missing import missing
from .ssd_chunk_state import into_chunks

__all__ = ["chunk_scan", "chunk_scan_ref"]

__getattr__ = missing(__name__)


def chunk_scan(
    B: Tensor, C: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, prev_states: Tensor, D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y (B, L, H, P).

    Args:
        B, C: (B, L, G, N). x, z: (B, L, H, P). dt, dA_cumsum: (B, H, C, Q). D: (H,) or (H, P).
        prev_states: (B, C, H, P, N), the state with which each chunk is entered.
    """
    length, count = x.shape[1:3]
    size, dtype = dt.shape[-1], dA_cumsum.dtype
    b, c = (heads(into_chunks(t, size).to(dtype), count).transpose(2, 3) for t in (B, C))  # (B, C, H, Q, N)
    v = into_chunks(x, size).to(dtype).transpose(2, 3) * dt.transpose(1, 2)[..., None]
    sums = dA_cumsum.transpose(1, 2)  # (B, C, H, Q)
    log_a = sums.diff(dim=-1, prepend=sums.new_zeros(*sums.shape[:-1], 1))
    inside = (c @ b.transpose(-1, -2)) * decay_matrix(log_a, None)
    y = inside @ v + (c @ prev_states.to(dtype).transpose(-1, -2)) * sums.exp()[..., None]
    y = y.transpose(2, 3).flatten(1, 2)[:, :length]
    if D is not None:
        y = y + x.to(dtype) * (D[:, None] if D.ndim == 1 else D).to(dtype)
    if z is not None:
        y = y * silu(z.to(dtype))
    return y.to(x.dtype)


chunk_scan_ref = chunk_scan
