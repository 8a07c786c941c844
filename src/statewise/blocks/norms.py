"""Norms of encoders, all called as norm(x (B, L, D), seg)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._names import unknown
from ..mixers import layers
from ..segments import Segments


class LayerNorm(nn.LayerNorm):
    """Mean 0 and variance 1 over the channels of each position, then weight and bias (Ba et al. 2016)."""

    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        return super().forward(x)


class RMSNorm(layers.RMSNorm):
    """Root mean square 1 over the channels of each position, then a weight (arXiv 1910.07467)."""

    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        return super().forward(x)


class BatchNorm(nn.Module):
    """Mean 0 and variance 1 of each channel over all valid positions of a batch; in evaluation over those of training.

    Padding takes no part in the statistics and comes out as zero, so a batch means the same however far it is padded.
    In evaluation the running statistics are rid of the 0 and 1 that they began with: where variances are small, those
    count for the most of them for a hundred batches.

    Args:
        momentum: share of the present batch in the running statistics.

    Source: Ioffe & Szegedy 2015 (arXiv 1502.03167).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, d_model: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"BatchNorm: momentum: want more than 0 and at most 1, got {momentum}")
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("running_mean", torch.zeros(d_model))
        self.register_buffer("running_var", torch.ones(d_model))
        self.register_buffer("num_batches_tracked", torch.tensor(0.0))  # model files hold no integers

    def _normed(self, rows: Tensor) -> Tensor:
        # A single position has no variance to train on; it is treated as in evaluation.
        train = self.training and len(rows) > 1
        if train:
            self.num_batches_tracked += 1
        mean, var = (self.running_mean, self.running_var) if train else self._statistics()
        return F.batch_norm(rows, mean, var, self.weight, self.bias, train, self.momentum, self.eps)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the batches of training; 0 and 1 before there was any."""
        began = (1 - self.momentum) ** self.num_batches_tracked
        share = torch.where(self.num_batches_tracked > 0, 1 - began, 1)
        began = torch.where(self.num_batches_tracked > 0, began, 0)
        return self.running_mean / share, ((self.running_var - began) / share).clamp(min=0)

    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        if seg is None or seg.valid is None:
            return self._normed(x.flatten(0, 1)).view_as(x)
        if not self.training:
            return seg.mask(self._normed(x.flatten(0, 1)).view_as(x))
        rows, places = x.flatten(0, 1), seg.valid.flatten().nonzero().squeeze(1)
        normed = self._normed(rows.index_select(0, places)).to(x.dtype)
        return torch.zeros_like(rows).index_copy(0, places, normed).view_as(x)


_NORMS: dict[str, type[nn.Module]] = {"layer": LayerNorm, "batch": BatchNorm, "rms": RMSNorm}


def norm_named(name: str, d_model: int) -> nn.Module:
    """The norm "layer", "batch" or "rms" of width D."""
    if name not in _NORMS:
        raise ValueError(unknown("norm", name, _NORMS))
    return _NORMS[name](d_model)
