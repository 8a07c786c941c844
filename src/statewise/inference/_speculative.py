"""Drafts: guesses of the next tokens, which the model then checks, many in one call.

The text stays that of the model alone (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318):

- A guess made with certainty (look-up, or a draft model that decodes greedily) is kept if it is the very token that the
  model picks. Text and random numbers are those of decoding without a draft.
- A guess drawn from probabilities q is kept with probability min(1, p / q), else the token is drawn from what p has
  over q, max(p - q, 0). The token then has the probabilities p of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import state as states
from ._checks import at_least
from ._reading import CHUNK, fresh_state, prefill
from ._sampling import Sampling, Uniforms, draw


class Guess(NamedTuple):
    """What may come next.

    Args:
        tokens: k of them, k >= 0.
        q: (k, V) float32, the probabilities they were drawn from; None if nothing was drawn.
    """

    tokens: list[int]
    q: Tensor | None = None


class Writing(Protocol):
    """A row under way, as a draft sees it."""

    index: int  # of the row among all prompts

    def text(self, start: int = 0) -> Tensor:
        """(n,) int64: prompt and what was made, from position `start` on."""


class Draft(Protocol):
    """Anything that guesses. A draft serves one call of `generate` at a time."""

    def begin(self, sampling: Sampling, seeds: Sequence[int], vocabulary: int) -> None:
        """A new set of rows, one seed each, over tokens in [0, vocabulary)."""

    def guess(self, rows: Sequence[Writing], limits: Sequence[int]) -> list[Guess]:
        """Up to limits[i] tokens for rows[i]. Rows that have ended are not among them any more."""


class NGram:
    """Guess by looking up: where the last few tokens occurred before in the same text, and what followed.

    It costs no call of any model, and pays off where text repeats itself: summaries, code, edits, tables.

    Args:
        length: tokens that must match; >= 1. If so many do not occur, no guess is made.
        tokens: how many to guess at most; >= 1.

    Source: Saxena 2023, "Prompt lookup decoding".
    """

    def __init__(self, length: int = 3, tokens: int = 8) -> None:
        at_least("length", length, 1)
        at_least("tokens", tokens, 1)
        self.length, self.tokens = length, tokens
        # Per row: where the text after each n-gram begins, latest occurrence; and how far the text is indexed.
        self._index: dict[int, tuple[dict[tuple[int, ...], int], int]] = {}

    def begin(self, sampling: Sampling, seeds: Sequence[int], vocabulary: int) -> None:
        self._index = {}

    def guess(self, rows: Sequence[Writing], limits: Sequence[int]) -> list[Guess]:
        return [Guess(self._look_up(row, min(limit, self.tokens))) for row, limit in zip(rows, limits)]

    def _look_up(self, row: Writing, limit: int) -> list[int]:
        known, done = self._index.get(row.index, ({}, 0))
        # Only the new end of the text is read, so a long text costs its length once.
        begin = max(0, done - self.length + 1)
        tail = row.text(begin).tolist()
        for i in range(len(tail) - self.length):
            known[tuple(tail[i : i + self.length])] = begin + i + self.length
        self._index[row.index] = known, begin + len(tail) - 1
        if len(tail) < self.length or limit < 1:
            return []
        at = known.get(tuple(tail[len(tail) - self.length :]))
        if at is None:
            return []
        found = row.text(at)[:limit].tolist()
        # The match may lie right before the end: then the text is periodic, and the guess goes on with the period.
        return (found * (-(-limit // len(found))))[:limit]


class DraftModel:
    """Guess with a small model of the same vocabulary.

    Args:
        model: causal, in eval mode.
        tokens: how many to guess at most; >= 1.
        chunk: positions per call when it reads the prompts.
    """

    def __init__(self, model: Any, tokens: int = 4, chunk: int = CHUNK) -> None:
        at_least("tokens", tokens, 1)
        self.model, self.tokens, self.chunk = model, tokens, chunk
        self.calls = 0  # of the draft model, since `begin`

    def begin(self, sampling: Sampling, seeds: Sequence[int], vocabulary: int) -> None:
        """Fresh states; the prompts are read with the first guess."""
        own = getattr(self.model, "vocab_size", vocabulary)
        if own != vocabulary:
            raise ValueError(f"draft: want a model with the same vocabulary of {vocabulary} tokens, got {own}")
        self._sampling, self.calls = sampling, 0
        # Not the numbers with which the model's own tokens are drawn: guess and check must be independent.
        self._uniforms = Uniforms([seed + 2**63 for seed in seeds])
        self._rows = list(range(len(seeds)))
        self._read = [0] * len(seeds)  # tokens of each row's text that its state holds
        self._state = fresh_state(self.model, len(seeds))

    def _catch_up(self, rows: Sequence[Writing]) -> tuple[Tensor, Any]:
        """Read what the texts have gained: (logits after it, state that guesses may consume)."""
        if [row.index for row in rows] != self._rows:
            places = [self._rows.index(row.index) for row in rows]
            self._state = states.select(self._state, places)
            self._read, self._rows = [self._read[p] for p in places], [row.index for row in rows]
        new = [row.text(done) for row, done in zip(rows, self._read)]
        logits, self._state = prefill(self.model, new, self._state, chunk=self.chunk)
        self.calls += -(-max(map(len, new)) // self.chunk)
        self._read = [done + len(piece) for done, piece in zip(self._read, new)]
        return logits, states.clone(self._state)

    @torch.no_grad()
    def guess(self, rows: Sequence[Writing], limits: Sequence[int]) -> list[Guess]:
        count = min(self.tokens, max(limits))
        if count < 1:
            return [Guess([]) for _ in rows]
        logits, state = self._catch_up(rows)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for b, row in enumerate(rows):
            seen[b, row.text().to(seen.device)] = True
        made: list[Tensor] = []
        weights = []
        for _ in range(count):
            if made:
                logits, state = self.model.step(made[-1], state)
                self.calls += 1
            if self._sampling.greedy:
                token = self._sampling.pick(logits, seen, None)
            else:
                q = self._sampling.probabilities(logits, seen)
                token = draw(q, self._uniforms.take(self._rows))
                weights.append(q)
            seen.scatter_(1, token[:, None], True)
            made.append(token)
        tokens = torch.stack(made, 1).tolist()
        q_all = torch.stack(weights, 1) if weights else None
        return [
            Guess(tokens[b][:limit], None if q_all is None else q_all[b, :limit])
            for b, limit in enumerate(min(count, limit) for limit in limits)
        ]


def verdict(p: Tensor, q: Tensor, token: int, uniforms: Uniforms, row: int) -> int:
    """`token`, drawn from q (V,), or the token that replaces it: in all it is distributed as p (V,)."""
    if uniforms.one(row) * float(q[token]) < float(p[token]):
        return token
    rest = (p - q).clamp(min=0)
    if not bool(rest.any()):  # p and q differ by rounding only
        rest = p
    return int(draw(rest[None], uniforms.take([row])))
