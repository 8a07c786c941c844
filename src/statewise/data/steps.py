"""Data modules in which the batch of a step is a pure function of (seed, step).

So a run that was killed goes on with exactly the batches it would have had, with nothing about the data in the
checkpoint, and N devices see the same global batch as one device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..segments import Segments

IGNORE = -100  # target of a position that is not scored, as in torch.nn.functional.cross_entropy


class Batch(NamedTuple):
    """What a model takes and what it should say.

    Args:
        tokens: (B, L) int64, or values (B, L, C).
        targets: one for each position, (B, L) or (B, L, ...); or one for each row, (B,); or one for every n rows that
            stand side by side, (B / n,). IGNORE where nothing is scored.
        seg: documents and padding, if any.
    """

    tokens: Tensor
    targets: Tensor
    seg: Segments | None = None


def share(batch: Batch, rank: int, world: int) -> Batch:
    """The rows of one process. Every process gets as many: a last batch that does not divide is filled with rows in
    which nothing is scored, because sharded models need the same number of forward passes everywhere."""
    tokens, targets, seg = batch
    count = len(targets)
    group = len(tokens) // count if count else 1  # rows that belong together
    missing = -count % world
    if missing:
        again = torch.cat([torch.arange(len(tokens)), torch.arange(group).repeat(missing)])
        tokens, seg = tokens[again], None if seg is None else seg[again]
        targets = torch.cat([targets, torch.full_like(targets[:1], IGNORE).expand(missing, *targets.shape[1:])])
    begin, end = (r * len(targets) // world for r in (rank, rank + 1))
    rows = slice(begin * group, end * group)
    return Batch(tokens[rows], targets[begin:end], None if seg is None else seg[rows])


class _Train(IterableDataset):
    def __init__(self, data: StepData, start: int, stop: int, rank: int, world: int) -> None:
        self.data, self.start, self.stop, self.rank, self.world = data, start, stop, rank, world

    def __iter__(self) -> Iterator[Batch]:
        # A negative number of steps is Lightning's word for "no limit".
        for step in count(self.start) if self.stop < 0 else range(self.start, self.stop):
            yield share(self.data.batch(step), self.rank, self.world)


class _Validation(IterableDataset):
    def __init__(self, batches: Sequence[Batch], rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield share(batch, self.rank, self.world)

    def __len__(self) -> int:
        return len(self.batches)


class StepData(pl.LightningDataModule, ABC):
    """A data module given by two functions.

    Args:
        batch_size: rows of the global batch; must divide by the number of devices.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size: want at least 1, got {batch_size}")
        self.batch_size = batch_size

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The global batch of training step `step` (0, 1, ...): a pure function of the seed and the step."""

    @abstractmethod
    def validation(self) -> Sequence[Batch]:
        """The same batches each time."""

    @property
    def tokens_per_step(self) -> int:
        """Positions of a global batch, for reports of speed; a mean where batches differ."""
        rows, length = self.batch(0).tokens.shape[:2]
        return rows * length

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        if trainer is None:
            return 0, 1
        if self.batch_size % trainer.world_size:
            raise ValueError(
                f"batch_size: {self.batch_size} rows do not divide over {trainer.world_size} devices; "
                f"want a multiple of {trainer.world_size}"
            )
        return trainer.global_rank, trainer.world_size

    def train_dataloader(self) -> DataLoader:
        # Lightning restores its counters before it asks for the loader, so a resumed run starts at its own step.
        start, stop = (0, -1) if self.trainer is None else (self.trainer.global_step, self.trainer.max_steps)
        return DataLoader(_Train(self, start, stop, *self._place()), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_Validation(self.validation(), *self._place()), batch_size=None)
