"""One label for a sequence, and the objectives that prepare a model for it on the same inputs."""

from __future__ import annotations

from torch import Tensor

from ..data.steps import IGNORE
from .causal_lm import Recall, Task


class Classification(Recall):
    """Cross-entropy of one label a row (or a pair of rows); the headline is the share of labels that are right."""


class Restoration(Task):
    """Values at scored positions, such as the pixels that were masked; the loss is the mean absolute difference.

    The model's outputs are (B, L, C) and the targets too, in units of the standard deviation of the data.

    Source: "Never Train from Scratch" (arXiv 2310.02980), section 3.
    """

    def total_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scored = targets != IGNORE
        return (outputs.float() - targets).abs().masked_fill(~scored, 0).sum()
