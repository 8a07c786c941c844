"""Generated tasks that tell mixers apart. Only answer positions are scored, so accuracy is per answer."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch

from .steps import IGNORE, Batch, StepData


class ProbeData(StepData):
    """Rows that `sample` draws; validation draws from a seed that training never uses.

    Args:
        batch_size: rows per training step, over all devices.
        n_validation: rows of the validation set.
        seed: the batch of a step is a function of (seed, step) alone.
    """

    vocab_size: int

    def __init__(self, batch_size: int = 64, *, n_validation: int = 512, seed: int = 0) -> None:
        super().__init__(batch_size)
        self.n_validation, self.seed = n_validation, seed

    @abstractmethod
    def sample(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), each (rows, L) int64, IGNORE in targets where nothing is asked."""

    def _draw(self, rows: int, *key: int) -> Batch:
        tokens, targets = self.sample(rows, np.random.default_rng(key))
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

    def batch(self, step: int) -> Batch:
        return self._draw(self.batch_size, self.seed, 0, step)

    def validation(self) -> list[Batch]:
        tokens, targets, _ = self._draw(self.n_validation, self.seed, 1)
        return [Batch(t, y) for t, y in zip(tokens.split(self.batch_size), targets.split(self.batch_size))]


class SelectiveCopyingData(ProbeData):
    """Symbols stand at random places among noise; after the noise they must be given back in order.

    A row is `length` positions that hold `n_copy` symbols and otherwise noise, then `n_copy` markers; at marker i the
    answer is symbol i. A fixed convolution cannot do this, because the distance between a symbol and its answer
    changes from row to row: which inputs to keep depends on what they are.

    Source: Gu and Dao, "Mamba" (2023), section 4.1.1 (there length 4096 and 16 symbols to copy).

    Args:
        length: positions before the answers.
        n_copy: symbols to give back.
        n_symbols: different symbols; chance is 1 / n_symbols.
    """

    def __init__(
        self,
        batch_size: int = 64,
        length: int = 64,
        n_copy: int = 8,
        n_symbols: int = 16,
        *,
        n_validation: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, n_validation=n_validation, seed=seed)
        if not 1 <= n_copy <= length:
            raise ValueError(f"n_copy: want 1 to length = {length}, got {n_copy}")
        if n_symbols < 2:
            raise ValueError(f"n_symbols: want at least 2, got {n_symbols}")
        self.length, self.n_copy, self.n_symbols = length, n_copy, n_symbols
        self.noise, self.marker, self.vocab_size = n_symbols, n_symbols + 1, n_symbols + 2

    def sample(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        symbols = rng.integers(0, self.n_symbols, (rows, self.n_copy))
        places = np.sort(np.argsort(rng.random((rows, self.length)), axis=1)[:, : self.n_copy], axis=1)
        tokens = np.full((rows, self.length + self.n_copy), self.noise, np.int64)
        np.put_along_axis(tokens, places, symbols, axis=1)
        tokens[:, self.length :] = self.marker
        targets = np.full_like(tokens, IGNORE)
        targets[:, self.length :] = symbols
        return tokens, targets


class MQARData(ProbeData):
    """Multi-query associative recall: key-value pairs first, then the keys again in any order, each asking its value.

    A row of `length` begins with `n_pairs` pairs; in what follows each key stands once more at a random place (the
    answer there is its value) among blanks.

    Source: Arora et al., "Zoology" (2023, arXiv 2312.04927). There the rest of a row is random tokens; here it is
    blanks, as in Sieber et al. 2024 (arXiv 2405.15731).

    Args:
        length: tokens of a row, at least 3 per pair (4 with `gap_power`).
        n_pairs: pairs to remember.
        vocab_size: half of the tokens are keys, half values, beside one blank.
        gap_power: a of the power law of the papers (they take 0.01): queries stand at every second place after the
            pairs, and the g-th of these is drawn with a weight of g^(a - 1), so most come soon. None: anywhere alike.
    """

    def __init__(
        self,
        batch_size: int = 64,
        length: int = 64,
        n_pairs: int = 8,
        vocab_size: int = 256,
        gap_power: float | None = None,
        *,
        n_validation: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, n_validation=n_validation, seed=seed)
        each = 3 if gap_power is None else 4
        if n_pairs < 1 or each * n_pairs > length:
            raise ValueError(f"n_pairs: want 1 to length / {each} = {length // each}, got {n_pairs}")
        self.gap_power = gap_power
        self.length, self.n_pairs, self.vocab_size = length, n_pairs, vocab_size
        self.blank, self.n_values = 0, vocab_size // 2
        self.n_keys = vocab_size - 1 - self.n_values
        if self.n_keys < n_pairs:
            raise ValueError(f"vocab_size: {vocab_size} has {self.n_keys} keys, too few for n_pairs = {n_pairs}")

    def sample(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        n = self.n_pairs
        keys = 1 + np.argsort(rng.random((rows, self.n_keys)), axis=1)[:, :n]
        values = 1 + self.n_keys + rng.integers(0, self.n_values, (rows, n))
        tokens = np.full((rows, self.length), self.blank, np.int64)
        tokens[:, 0 : 2 * n : 2] = keys
        tokens[:, 1 : 2 * n : 2] = values
        places = 2 * n + self._gaps(rows, rng)
        np.put_along_axis(tokens, places, keys, axis=1)
        targets = np.full_like(tokens, IGNORE)
        np.put_along_axis(targets, places, values, axis=1)
        return tokens, targets

    def _gaps(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        """Where the queries stand, counted from the end of the pairs: (rows, n_pairs), all different in a row."""
        room = self.length - 2 * self.n_pairs
        if self.gap_power is None:
            return np.argsort(rng.random((rows, room)), axis=1)[:, : self.n_pairs]
        weight = np.arange(1, room // 2 + 1) ** (self.gap_power - 1.0)
        # The shortest of exponential waiting times, with the weights as rates: draws without putting back.
        waiting = rng.exponential(size=(rows, room // 2)) / weight
        return 2 * np.argsort(waiting, axis=1)[:, : self.n_pairs]
