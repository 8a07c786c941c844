"""One residual branch, with its norm before or after."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mixers.base import SequenceMixer
from ..segments import Segments


class Branch(nn.Module):
    """x + drop(part(norm(x))) with prenorm, else norm(x + drop(part(x))).

    Args:
        part: a mixer (B, L, D) -> (B, L, D), causal or not, or a position-wise part.
        norm: called as norm(x, seg); see `blocks.norms`.
        dropout: one mask per row and channel for the whole sequence, so that no position tells what another lost.

    Source: He et al. 2015 (arXiv 1512.03385); norm before or after: Xiong et al. 2020 (arXiv 2002.04745).
    """

    def __init__(self, part: nn.Module, norm: nn.Module, *, prenorm: bool = True, dropout: float = 0.0):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: want 0 <= dropout < 1, got {dropout}")
        self.part, self.norm = part, norm
        self.prenorm, self.dropout = prenorm, dropout

    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        y = self.norm(x, seg) if self.prenorm else x
        y = self.part(y, seg) if isinstance(self.part, SequenceMixer) else self.part(y)
        if self.dropout and self.training:
            y = y * F.dropout(torch.ones_like(y[:, :1]), self.dropout)
        x = x + y
        return x if self.prenorm else self.norm(x, seg)
