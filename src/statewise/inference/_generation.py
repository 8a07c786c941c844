"""Generation: read the prompts, then make tokens, one or several per call of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import state as states
from ..state import State
from ._checks import at_least
from ._prompts import Prompt, check_prompts, read_all
from ._reading import CHUNK, Context, Progress, compact, device_of, padded, prefill
from ._sampling import Rule, Sampling, Uniforms, row_seeds
from ._speculative import Draft, Guess, verdict

DONE = -1  # what a row yields after it has ended

# A row whose guess was wrong keeps the state from before the call; its next call reads the accepted tokens once more,
# together with new guesses. That saves a call for each wrong guess. A row that would have to read more than this makes
# one call without guesses, which brings its state up to date.
BEHIND = 16

Until = Callable[[int, list[int]], bool]


class Row:
    """One text under way."""

    def __init__(self, index: int, prompt: Tensor) -> None:
        self.index, self.prompt = index, prompt
        self.made: list[int] = []
        self.logprobs: list[float] = []
        self.unread = 0  # tokens at the end of the text that the state does not hold yet
        self.over = False

    def text(self, start: int = 0) -> Tensor:
        made = torch.tensor(self.made[max(start - len(self.prompt), 0) :], dtype=torch.int64)
        return torch.cat([self.prompt[start:], made])

    def pending(self) -> Tensor:
        """The tokens that the state does not hold yet; all of them were made, none is of the prompt."""
        return torch.tensor(self.made[len(self.made) - self.unread :], dtype=torch.int64)


class Generation(Iterator[Tensor]):
    """What `generate` returns: an iterator over the tokens, and an account of them.

    Iterating gives (B,) int64, the next token of each row; DONE (-1) for rows that have ended. It ends when all have.
    A token is computed when it is asked for.

    Attributes:
        calls: calls of the model since the prompts were read.
        guessed, accepted: tokens that a draft proposed, and how many of them stood.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Tensor],
        state: State,
        logits: Tensor,
        max_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        stop: Collection[int] = (),
        until: Until | None = None,
        draft: Draft | None = None,
        logprobs: bool = False,
    ) -> None:
        self._model, self._state = model, state
        self._logits: Tensor | None = logits  # of the next token, where the state holds all of every text
        self._rows = [Row(index, prompt) for index, prompt in enumerate(prompts)]
        self._active = list(self._rows)
        self._ended: dict[int, State] = {}
        self._sampling, self._uniforms = sampling, Uniforms(seeds)
        self._max_tokens, self._stop, self._until = max_tokens, frozenset(stop), until
        self._draft, self._want_logprobs = draft, logprobs
        self._seen = torch.zeros_like(logits, dtype=torch.bool)
        for b, prompt in enumerate(prompts):
            self._seen[b, prompt.to(logits.device)] = True
        self._columns = 0
        self.calls = self.guessed = self.accepted = 0
        if draft is not None:
            draft.begin(sampling, seeds, logits.shape[-1])

    @property
    def made(self) -> list[list[int]]:
        """For each row the tokens made so far. With a draft they may be ahead of what was iterated."""
        return [row.made for row in self._rows]

    @property
    def logprobs(self) -> list[list[float]]:
        """For each row log p of the tokens in `made` under the model itself: natural log, before temperature and
        rules. They must have been asked for: `generate(..., logprobs=True)`."""
        if not self._want_logprobs:
            raise ValueError("logprobs: were not asked for; want generate(..., logprobs=True)")
        return [row.logprobs for row in self._rows]

    def context(self, row: int = 0) -> Context:
        """Prompt and what was made of one row, read by the model: to go on from, to store, to fork."""
        text = self._rows[row]
        state = self._ended.get(row)
        if state is None:
            state = states.select(self._state, [self._active.index(text)])
        pending = text.pending()
        if len(pending) == 0:
            assert self._logits is not None  # nothing was made yet
            return Context(text.prompt, compact(state), self._logits[row])
        logits, state = prefill(self._model, [pending], states.clone(state))
        return Context(text.text(), compact(state), logits[0])

    # ---- iterating ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __next__(self) -> Tensor:
        at = self._columns
        if at == self._max_tokens:
            raise StopIteration
        while any(len(row.made) == at for row in self._active):
            self._advance()
        column = [row.made[at] if at < len(row.made) else DONE for row in self._rows]
        if all(token == DONE for token in column):
            raise StopIteration
        self._columns += 1
        return torch.tensor(column, device=device_of(self._model))

    def _advance(self) -> None:
        """At least one more token for every active row, with one call of the model."""
        guesses = self._guesses()
        if any(guess.tokens for guess in guesses):
            self._check(guesses)
        else:
            self._one_each(self._next_logits())
        self._drop_ended()

    def _guesses(self) -> list[Guess]:
        if self._draft is None or self._logits is not None:
            return []
        # The call that checks the guesses gives one token more.
        limits = [0 if r.unread > BEHIND else self._max_tokens - len(r.made) - 1 for r in self._active]
        return self._draft.guess(self._active, limits) if any(limits) else []

    def _next_logits(self) -> Tensor:
        """Logits (A, V) after the whole text of each active row, which the state then holds."""
        if self._logits is not None:
            return self._logits
        pieces = [row.pending() for row in self._active]
        self.calls += 1
        if all(len(piece) == 1 for piece in pieces):
            logits, self._state = self._model.step(torch.cat(pieces).to(device_of(self._model)), self._state)
        else:
            logits, self._state = prefill(self._model, pieces, self._state)
        for row in self._active:
            row.unread = 0
        return logits

    def _one_each(self, logits: Tensor) -> None:
        uniform = None if self._sampling.greedy else self._uniforms.take([row.index for row in self._active])
        token = self._sampling.pick(logits, self._seen, uniform)
        self._logits = None
        self._seen.scatter_(1, token[:, None], True)
        for b, (row, made) in enumerate(zip(self._active, token.tolist())):
            self._append(row, made, logits[b])

    def _append(self, row: Row, token: int, logits: Tensor) -> None:
        row.made.append(token)
        row.unread += 1
        if self._want_logprobs:
            row.logprobs.append(float(logits.float().log_softmax(-1)[token]))
        stopped = token in self._stop or len(row.made) == self._max_tokens
        # Asked about every token, once and in order.
        row.over = (self._until is not None and self._until(row.index, row.made)) or stopped

    def _drop_ended(self) -> None:
        """Rows that have ended leave the batch: the others go on at the speed of a smaller one."""
        keep = [b for b, row in enumerate(self._active) if not row.over]
        if len(keep) == len(self._active):
            return
        for b, row in enumerate(self._active):
            if row.over:
                self._ended[row.index] = states.select(self._state, [b])
        self._active = [self._active[b] for b in keep]
        self._state, self._seen = states.select(self._state, keep), self._seen[keep]

    # ---- guesses -----------------------------------------------------------------------------------------------

    def _check(self, guesses: list[Guess]) -> None:
        """Read what is pending and the guesses of each row in one call; keep the guesses that stand."""
        pieces = [torch.cat([r.pending(), torch.tensor(g.tokens, dtype=torch.int64)]) for r, g in self._both(guesses)]
        longest = max(map(len, pieces))
        tokens, seg = padded(pieces, 0, longest, device_of(self._model))
        before = states.clone(self._state)
        logits, after = self._model.extend(tokens, self._state, seg)
        self.calls += 1
        whole = []
        for b, (row, guess) in enumerate(self._both(guesses)):
            # The guesses stand at the end: the first of them was to follow the position before.
            stood, all_stood = self._judge(b, row, guess, logits[b, longest - len(guess.tokens) - 1 :])
            self.guessed, self.accepted = self.guessed + len(guess.tokens), self.accepted + stood
            whole.append(all_stood)
            if all_stood:
                row.unread = 1
        self._state = roll_back(before, after, whole)

    def _both(self, guesses: list[Guess]) -> list[tuple[Row, Guess]]:
        return list(zip(self._active, guesses))

    def _judge(self, b: int, row: Row, guess: Guess, logits: Tensor) -> tuple[int, bool]:
        """Append tokens by logits (k + 1, V), the first before the guesses, until a guess does not stand or the row
        ends. Returns how many stood, and whether the state after all of them is that of the text without its last
        token."""
        for i, now in enumerate(logits):
            guessed = guess.tokens[i] if i < len(guess.tokens) else None
            token = self._choose(now[None], self._seen[b : b + 1], row, guess, i)
            self._seen[b, token] = True
            self._append(row, token, now)
            if token != guessed:
                return i, guessed is None
            if row.over:
                return i + 1, False
        raise AssertionError("the last token has no guess to agree with")

    def _choose(self, logits: Tensor, seen: Tensor, row: Row, guess: Guess, i: int) -> int:
        if guess.q is not None and i < len(guess.tokens):
            p = self._sampling.probabilities(logits, seen)[0]
            return verdict(p, guess.q[i], guess.tokens[i], self._uniforms, row.index)
        uniform = None if self._sampling.greedy else self._uniforms.take([row.index])
        return int(self._sampling.pick(logits, seen, uniform))


def roll_back(before: State, after: State, keep: Sequence[bool]) -> State:
    """Row by row the state `after` a call where `keep`, else the one `before` it."""
    kept, undone = ([b for b, k in enumerate(keep) if k == which] for which in (True, False))
    if not kept:
        return before
    if undone:
        both = states.merge([states.select(after, kept), states.select(before, undone)])
        order = torch.tensor(kept + undone).argsort()
        after = states.select(both, order)
    return compact(after)


def generate(
    model: Any,
    prompts: Tensor | Sequence[Prompt],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    rules: Sequence[Rule] = (),
    seed: int | Sequence[int] | None = None,
    stop: Collection[int] = (),
    until: Until | None = None,
    draft: Draft | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    logprobs: bool = False,
) -> Generation:
    """Continue prompts, one token per row at a time. Each row is what it would be alone.

    Args:
        model: has `init_state`, `extend` and `step`, as every causal model here, and perhaps `prefill`, which is then
            used for the prompts; put it in eval mode first.
        prompts: (B, L) tokens, or B prompts, each a list or tensor of tokens of any length, or a `Context` that was
            read before. Shorter ones are padded on the left; the padding changes nothing.
        max_tokens: tokens to make per row, >= 0.
        temperature, top_k, top_p, min_p, repetition_penalty, rules: see `Sampling`; temperature 0 is greedy.
        seed: of the draws: one per row, or one number s that stands for s, s + 1, ...; None takes PyTorch's own random
            numbers. What a row draws depends on its own seed only.
        stop: a row ends after any of these tokens.
        until: called with (row, tokens made so far) after each token; a row ends when it returns True.
        draft: guesses tokens which the model checks, several in one call: `NGram` or `DraftModel`. The text is that of
            the model alone: the same for greedy decoding (rounding apart: the model is called with other lengths) and
            with `NGram`, and drawn from the same probabilities with a `DraftModel`.
        chunk, progress: how the prompts are read, see `read`.
        logprobs: also keep the log-probability of each token.

    Returns:
        `Generation`, an iterator over (B,) int64; DONE (-1) stands for rows that have ended. The prompts are read here,
        the tokens are made when they are asked for.

    Raises:
        ValueError: an argument outside its range; the message names it.
    """
    at_least("max_tokens", max_tokens, 0)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, tuple(rules))
    given = check_prompts(model, prompts)
    seeds = row_seeds(seed, len(given))
    state, logits = read_all(model, given, chunk, progress)
    texts = [prompt.tokens if isinstance(prompt, Context) else prompt for prompt in given]
    return Generation(
        model, texts, state, logits, max_tokens, sampling, seeds,
        stop=stop, until=until, draft=draft, logprobs=logprobs,
    )  # fmt: skip
