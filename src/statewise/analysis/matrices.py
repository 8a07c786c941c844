"""Mixing matrices: which input goes into which output, and with what weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..mixers.base import HasMixing
from ..segments import Segments
from .dsf import own_system
from .system import HeadSystem


@dataclass(frozen=True)
class MixingMatrices:
    """The matrices of a mixer on one row of an input.

    Args:
        dense: (H, L, L), [head, output position, input position]. For a mixer whose matrix mixes channels, one matrix:
            the Frobenius norm over the channels.
        heads: which heads these are. total: how many there are.
        starts: positions where a document begins, 0 left out.
        what: the mixer, for titles.
    """

    dense: Tensor
    heads: tuple[int, ...]
    total: int
    starts: tuple[int, ...]
    what: str

    @property
    def mean_lag(self) -> Tensor:
        """(H,): how far back a head looks on average, in tokens, each entry by its magnitude."""
        size = self.dense.abs()
        at = torch.arange(size.shape[-1], device=size.device)
        lag = (at[:, None] - at).abs()
        return (size * lag).sum((1, 2)) / size.sum((1, 2)).clamp(min=torch.finfo(size.dtype).tiny)

    @property
    def diagonal_share(self) -> Tensor:
        """(H,): the part of all magnitude that stands on the diagonal: 1 mixes nothing."""
        size = self.dense.abs()
        own = size.diagonal(dim1=1, dim2=2).sum(1)
        return own / size.sum((1, 2)).clamp(min=torch.finfo(size.dtype).tiny)

    @property
    def rank(self) -> Tensor:
        """(H,): effective rank, exp of the entropy of the normalised singular values: 1 to L."""
        values = torch.linalg.svdvals(self.dense)
        share = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        return torch.exp(-torch.xlogy(share, share).sum(-1))


@torch.no_grad()
def mixing_matrices(
    mixer: HasMixing,
    x: Tensor,
    seg: Segments | None = None,
    *,
    row: int = 0,
    heads: Sequence[int] | int | None = None,
) -> MixingMatrices:
    """The matrices of `mixer` on row `row` of x (B, L, D); a head for each channel where channels are apart.

    Args:
        heads: which heads; a number means so many, spread evenly; None: all. Time and memory grow with their number
            where the mixer has a recurrence of its own.

    Raises:
        TypeError: the mixer is not linear in its values, so it has no matrix.
        ValueError: a head or row that is not there.
    """
    if not isinstance(mixer, HasMixing):
        raise TypeError(
            f"mixing_matrices: mixer: {type(mixer).__name__} has no matrix, because it is not one matrix times one "
            "value; `analysis.memory` has the gradients of its outputs, which every mixer has"
        )
    if not 0 <= row < len(x):
        raise ValueError(f"mixing_matrices: row: want 0 to {len(x) - 1}, got {row}")
    x, seg = x[row : row + 1], None if seg is None else seg[row : row + 1]
    system = None if heads is None else own_system(cast("nn.Module", mixer), x, seg)
    if isinstance(system, HeadSystem):
        total = system.v.shape[2]
        chosen = _chosen(heads, total)
        # Channels of a head differ where each has a skip of its own; they share all else.
        dense = system.heads(chosen).matrix()[0, :, 0]
    else:
        mixing = mixer.mixing(x, seg)
        dense = mixing.dense[0]
        if mixing.kind == "block":
            dense = torch.linalg.matrix_norm(dense, dim=(-2, -1))[None]
        total = len(dense)
        chosen = _chosen(heads, total)
        dense = dense[chosen]
    starts = () if seg is None else tuple(int(i) for i in seg.resets[0].nonzero()[:, 0] if i > 0)
    return MixingMatrices(dense, tuple(chosen), total, starts, type(mixer).__name__)


def _chosen(heads: Sequence[int] | int | None, total: int) -> list[int]:
    if heads is None or (isinstance(heads, int) and heads >= total):
        return list(range(total))
    if isinstance(heads, int):
        if heads < 1:
            raise ValueError(f"mixing_matrices: heads: want at least 1, got {heads}")
        return torch.linspace(0, total - 1, heads).round().long().tolist()
    for head in heads:
        if not 0 <= head < total:
            raise ValueError(f"mixing_matrices: heads: want 0 to {total - 1}, got {head}")
    return list(heads)
