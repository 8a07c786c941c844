"""Text as rows of bytes: random windows over the joined text, or packed documents."""

from __future__ import annotations

import numpy as np
import torch

from ..segments import Segments
from .steps import IGNORE, Batch, StepData
from .text import Corpus, TextOptions, load_corpus

N_BYTES = 256


class ByteData(StepData):
    """Bytes as tokens; the target of each position is the next byte of the same document.

    Args:
        corpus: training and held-out documents.
        batch_size: rows per step, over all devices.
        length: tokens per row.
        packed: False: each row is a random window over the joined training text. True: a row is filled with whole
            documents, each drawn with a probability proportional to its size; the last one is a random piece of what
            fits. `Batch.seg` then keeps them apart, and the last byte of a document has no target.
        seed: the batch of a step is a function of (seed, step) alone.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch_size: int = 16,
        length: int = 256,
        *,
        packed: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size)
        if length < 1:
            raise ValueError(f"length: want at least 1, got {length}")
        self.corpus, self.length, self.packed, self.seed = corpus, length, packed, seed
        text, held_out = b"".join(corpus.train), b"".join(corpus.held_out)
        total = len(text) + len(held_out)
        if len(text) < batch_size * length + 1:
            raise ValueError(
                f"data.path: {corpus.name} is too small: {total} bytes, of which {len(text)} are for training, but "
                f"one batch takes batch_size x length = {batch_size} x {length} = {batch_size * length} bytes and one "
                f"more; use a longer text, or a smaller --batch-size or --length"
            )
        if len(held_out) < 2:
            raise ValueError(
                f"data.held_out: only {len(held_out)} of {total} bytes of {corpus.name} are held out; "
                f"want at least 2: use a longer text or a larger share"
            )
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._held_out = torch.frombuffer(bytearray(held_out), dtype=torch.uint8)
        if packed:
            self._documents = [torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in corpus.train if len(d) > 1]
            sizes = np.array([len(d) for d in self._documents], np.float64)
            self._odds = sizes / sizes.sum()

    @classmethod
    def from_options(cls, options: TextOptions, batch_size: int, length: int, seed: int = 0) -> ByteData:
        return cls(load_corpus(options), batch_size, length, packed=options.packed, seed=seed)

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        if self.packed:
            return self._packed(rng)
        starts = torch.from_numpy(rng.integers(0, len(self._text) - self.length, self.batch_size))
        window = self._text[starts[:, None] + torch.arange(self.length + 1)].long()
        return Batch(window[:, :-1], window[:, 1:])

    def _packed(self, rng: np.random.Generator) -> Batch:
        tokens = torch.zeros(self.batch_size, self.length, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORE)
        lengths: list[list[int]] = []
        for row in range(self.batch_size):
            at, pieces = 0, []
            while self.length - at > 0:
                document = self._documents[rng.choice(len(self._documents), p=self._odds)]
                size = min(len(document), self.length - at)
                start = int(rng.integers(0, len(document) - size + 1))
                # One byte more, where there is one: the piece of a longer document knows what comes next.
                piece = document[start : start + size + 1].long()
                tokens[row, at : at + size] = piece[:size]
                targets[row, at : at + len(piece) - 1] = piece[1:]
                pieces.append(size)
                at += size
            lengths.append(pieces)
        return Batch(tokens, targets, Segments.pack(lengths, total=self.length))

    def validation(self) -> list[Batch]:
        """Every held-out byte but the first of each row, in rows of `length` that start from the zero state."""
        text = self._held_out.long()
        length = min(self.length, len(text) - 1)
        rows = (len(text) - 1) // length
        window = text[: rows * length + 1]
        tokens, targets = window[:-1].reshape(rows, length), window[1:].reshape(rows, length)
        return [Batch(t, y) for t, y in zip(tokens.split(self.batch_size), targets.split(self.batch_size))]
