"""How well a classifier does on a split: its answers to every label, and the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..data.steps import Batch
from ..training.options import Training


@dataclass(frozen=True)
class OfClass:
    """One class.

    Args:
        rows: that have this label.
        recall: share of these that got this answer; None if there are none.
        precision: share of right ones among the rows that got this answer; None if there are none.
    """

    name: str
    rows: int
    recall: float | None
    precision: float | None


@dataclass(frozen=True)
class Scores:
    """All answers.

    Args:
        counts: (K, K): row the label, column the model's answer.
        loss: mean cross-entropy, in nats.
    """

    counts: np.ndarray
    loss: float

    @property
    def rows(self) -> int:
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.counts) / max(self.rows, 1))

    def classes(self, names: Sequence[str] = ()) -> list[OfClass]:
        """Class by class; numbers for names where none are given."""
        labelled, answered, right = self.counts.sum(1), self.counts.sum(0), np.diagonal(self.counts)
        return [
            OfClass(
                names[k] if len(names) == len(self.counts) else str(k),
                int(labelled[k]),
                float(right[k] / labelled[k]) if labelled[k] else None,
                float(right[k] / answered[k]) if answered[k] else None,
            )
            for k in range(len(self.counts))
        ]


def device_of(training: Training) -> str:
    """Where a run with this training computes."""
    return "cuda" if training.accelerator in ("auto", "gpu") and torch.cuda.is_available() else "cpu"


@torch.no_grad()
def score(model: Any, batches: Iterable[Batch], classes: int, device: str = "cpu") -> Scores:
    """Ask the model about every row. It is in eval mode and on the CPU afterwards."""
    counts, loss = torch.zeros(classes, classes, dtype=torch.int64), 0.0
    model.to(device).eval()
    for x, labels, seg in batches:
        logits = model(x.to(device), None if seg is None else seg.to(device)).float().cpu()
        counts.index_put_((labels, logits.argmax(-1)), torch.ones_like(labels), accumulate=True)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    model.cpu()
    return Scores(counts.numpy(), loss / max(int(counts.sum()), 1))
