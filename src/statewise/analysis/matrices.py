"""Mixing matrices: which input goes into which output, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..mixers.base import HasMixing
from ..segments import Segments


@dataclass(frozen=True)
class MixingMatrices:
    """The matrices of a mixer on one row of an input.

    Args:
        dense: (H, L, L), [head, output position, input position]. For a mixer whose matrix mixes channels, one matrix:
            the Frobenius norm over the channels.
        starts: positions where a document begins, 0 left out.
        what: the mixer, for titles.
    """

    dense: Tensor
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
def mixing_matrices(mixer: HasMixing, x: Tensor, seg: Segments | None = None, row: int = 0) -> MixingMatrices:
    """The matrices of `mixer` on row `row` of x (B, L, D); a head for each channel where channels are apart.

    Memory grows with H L^2.

    Raises:
        TypeError: the mixer is not linear in its values, so it has no matrix.
    """
    if not isinstance(mixer, HasMixing):
        raise TypeError(
            f"mixing_matrices: mixer: {type(mixer).__name__} has no matrix, because it is not one matrix times one "
            "value; `analysis.memory` has the gradients of its outputs, which every mixer has"
        )
    if not 0 <= row < len(x):
        raise ValueError(f"mixing_matrices: row: want 0 to {len(x) - 1}, got {row}")
    seg = None if seg is None else seg[row : row + 1]
    mixing = mixer.mixing(x[row : row + 1], seg)
    dense = mixing.dense[0]
    if mixing.kind == "block":
        dense = torch.linalg.matrix_norm(dense, dim=(-2, -1))[None]
    starts = () if seg is None else tuple(int(i) for i in seg.resets[0].nonzero()[:, 0] if i > 0)
    return MixingMatrices(dense, starts, type(mixer).__name__)
