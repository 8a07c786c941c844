"""Batches of labelled sequences, and of the same sequences with parts hidden, to learn from before any label is told.

Both are functions of (seed, step), as every `StepData`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from ..segments import Segments
from .labelled import Labelled, Ragged, Split
from .steps import IGNORE, Batch, StepData

# Rows are padded to a multiple of this many positions: few different shapes, little padding.
ROUND = 32
MASK = 0  # the token that stands for what is hidden; data sets keep it for padding, so it is nowhere in a row


class ClassifyData(StepData):
    """Epochs of a data set in a random order each, without a break between them; rows padded on the right.

    Args:
        data: the set. Values enter as (raw - mean) / std; a pair of texts is two rows side by side.
        batch_size: rows per step (pairs, if the set has pairs), over all devices.
        seed: of the order.
        limit: use only this many training rows, drawn with a seed of their own so that every run has the same ones.
    """

    def __init__(self, data: Labelled, batch_size: int = 32, *, seed: int = 0, limit: int | None = None) -> None:
        super().__init__(batch_size)
        available = len(data.train)
        if limit is not None and not 1 <= limit <= available:
            raise ValueError(f"limit_train: want 1 to {available} rows, which {data.name} has, got {limit}")
        if not available:
            raise ValueError(f"data: {data.name} has no training rows")
        self.data, self.seed = data, seed
        self.rows = np.arange(available) if limit is None else np.random.default_rng(0).permutation(available)[:limit]
        self._order: dict[int, np.ndarray] = {}

    def epoch(self, number: int) -> np.ndarray:
        """The order of the training rows in epoch 0, 1, ..."""
        if number not in self._order:
            # A batch spans at most a few epochs; older orders are not needed again.
            self._order = {k: v for k, v in self._order.items() if k >= number - 1}
            self._order[number] = np.random.default_rng((self.seed, number)).permutation(self.rows)
        return self._order[number]

    def batch(self, step: int) -> Batch:
        at = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(at, len(self.rows))
        chosen = [self.epoch(int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return self.gather(self.data.train, np.concatenate(chosen))

    def validation(self) -> Sequence[Batch]:
        return self.split("validation")

    def split(self, name: Literal["train", "validation", "test"]) -> Sequence[Batch]:
        """All rows of a split, in order, in batches that are made when they are asked for.

        Of the training rows those that are trained on, which a `limit` may make fewer.
        """
        split: Split = getattr(self.data, name)
        rows = np.sort(self.rows) if name == "train" else np.arange(len(split))
        size = self.batch_size
        return _Lazy(lambda i: self.gather(split, rows[i * size : (i + 1) * size]), -(-len(rows) // size))

    def gather(self, split: Split, rows: np.ndarray) -> Batch:
        """The given rows of a split as a batch."""
        targets = torch.from_numpy(split.labels[rows].astype(np.int64))
        inputs = split.inputs
        if isinstance(inputs, np.ndarray):
            return Batch(_normalised(inputs[rows], self.data), targets)
        if isinstance(inputs, Ragged):
            tokens, seg = _padded([inputs[int(i)] for i in rows], self.data.length)
        else:
            tokens, seg = _padded([side[int(i)] for i in rows for side in inputs], self.data.length)
        return Batch(tokens, targets, seg)

    @property
    def tokens_per_step(self) -> int:
        inputs = self.data.train.inputs
        if isinstance(inputs, np.ndarray):
            return self.batch_size * inputs.shape[1]
        sides = (inputs,) if isinstance(inputs, Ragged) else inputs
        return round(self.batch_size * sum(float(side.lengths[self.rows].mean()) for side in sides))


def _normalised(raw: np.ndarray, data: Labelled) -> Tensor:
    return torch.from_numpy((raw.astype(np.float32) - np.float32(data.mean)) / np.float32(data.std))


def _padded(rows: list[np.ndarray], longest: int) -> tuple[Tensor, Segments]:
    lengths = [len(row) for row in rows]
    total = min(-(-max(lengths) // ROUND) * ROUND, max(longest, max(lengths)))
    tokens = torch.zeros(len(rows), total, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return tokens, Segments.from_lengths(lengths, total)


class _Lazy(Sequence[Batch]):
    def __init__(self, make: Callable[[int], Batch], count: int) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> Batch: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Batch]: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._make(k) for k in range(*i.indices(self._count))]
        if not -self._count <= i < self._count:
            raise IndexError(i)
        return self._make(i % self._count)


class DenoisingData(StepData):
    """The inputs of a classification set as their own targets; labels are not used.

    Args:
        base: where rows come from.
        objective: "masked": each position is hidden with probability `rate` and only hidden ones are scored. A hidden
            token becomes MASK; of a hidden value zeros are left, and a channel is added that is 1 where they
            are hidden. "causal": each position's target is the next one, for models that see the past only.
        rate: probability of hiding a position, anew in every batch.
        levels: the targets of values are classes, 0 to levels - 1 of the raw values (256 for grey levels); None: the
            normalised values themselves.

    Source: "Never Train from Scratch" (arXiv 2310.02980), section 3.
    """

    def __init__(
        self,
        base: ClassifyData,
        objective: Literal["masked", "causal"] = "masked",
        *,
        rate: float = 0.15,
        levels: int | None = None,
    ) -> None:
        super().__init__(base.batch_size)
        if objective not in ("masked", "causal"):
            raise ValueError(f"objective: want 'masked' or 'causal', got {objective!r}")
        if not 0 < rate < 1:
            raise ValueError(f"rate: want a probability above 0 and below 1, got {rate}")
        data = base.data
        if levels is not None and (data.vocab_size is not None or data.channels != 1):
            raise ValueError(f"levels: want a set with one value at each position, and {data.name} is not one")
        self.base, self.objective, self.rate, self.levels = base, objective, rate, levels

    @property
    def added_channels(self) -> int:
        """Channels of the inputs beyond those of the set."""
        return int(self.objective == "masked" and self.base.data.channels > 0)

    @property
    def n_outputs(self) -> int:
        """What a model must say about each position."""
        return self.levels or self.base.data.vocab_size or self.base.data.channels

    def batch(self, step: int) -> Batch:
        return self._denoising(self.base.batch(step), (self.base.seed, step, 1))

    def validation(self) -> Sequence[Batch]:
        whole = self.base.validation()
        return _Lazy(lambda i: self._denoising(whole[i], (0, i, 2)), len(whole))

    @property
    def tokens_per_step(self) -> int:
        return self.base.tokens_per_step

    def _denoising(self, batch: Batch, seed: tuple[int, ...]) -> Batch:
        x, _, seg = batch
        targets = self._targets(x)
        if self.objective == "causal":
            targets = targets.roll(-1, 1)
            # The last valid position has no next one.
            last = torch.ones(x.shape[:2], dtype=torch.bool)
            if seg is not None and seg.valid is not None:
                last[:, :-1] = ~seg.valid[:, 1:]
            else:
                last[:, :-1] = False
            return Batch(x, _ignored(targets, last), seg)
        hidden = torch.from_numpy(np.random.default_rng(seed).random(x.shape[:2]) < self.rate)
        if seg is not None and seg.valid is not None:
            hidden &= seg.valid
        targets = _ignored(targets, ~hidden)
        if x.ndim == 2:
            return Batch(x.masked_fill(hidden, MASK), targets, seg)
        # 0 where nothing is hidden, so that a model which later drops this channel sees what it is used to.
        gone = hidden.unsqueeze(-1).to(x.dtype)
        return Batch(torch.cat([x * (1 - gone), gone], -1), targets, seg)

    def _targets(self, x: Tensor) -> Tensor:
        if self.levels is None:
            return x
        raw = x[..., 0] * self.base.data.std + self.base.data.mean
        return raw.round().long().clamp(0, self.levels - 1)


def _ignored(targets: Tensor, where: Tensor) -> Tensor:
    return targets.masked_fill(where if targets.ndim == 2 else where.unsqueeze(-1), IGNORE)
