"""Reading text into a state: prompts of any length, in chunks, and texts of several lengths side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import state as states
from ..ops.attention import KVState
from ..segments import Segments
from ..state import State
from ._checks import at_least

CHUNK = 4096  # tokens per call of the model: large enough to be fast, and what one call holds stays small

Progress = Callable[[int, int], object]  # (positions read so far, positions in all)


class Context(NamedTuple):
    """A text that a model has read: what it takes to go on from there, to store it, or to fork it.

    Args:
        tokens: (n,) int64 on the CPU, the whole text from its first token, n >= 1.
        state: the model's state after them, one row.
        logits: (V,) of the token that comes next.

    Going on from a context copies it first, so one context can be continued any number of times.
    """

    tokens: Tensor
    state: State
    logits: Tensor


def as_tokens(name: str, tokens: Any) -> Tensor:
    """A list or tensor of token numbers as (n,) int64 on the CPU."""
    out = torch.as_tensor(tokens)
    if out.numel() == 0 and out.ndim == 1:
        return torch.zeros(0, dtype=torch.int64)
    if out.ndim != 1 or out.is_floating_point() or out.is_complex() or out.dtype == torch.bool:
        raise ValueError(f"{name}: want integers (n,), got {out.dtype} {tuple(out.shape)}")
    return out.to("cpu", torch.int64)


def check_vocabulary(model: Any, name: str, tokens: Tensor) -> None:
    """Raise unless all tokens have a row in the model's embedding, where it says how many there are."""
    size = getattr(model, "vocab_size", None)
    if not isinstance(size, int) or not len(tokens):
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: want tokens from 0 to {size - 1}, got {low if low < 0 else high}")


def padded(rows: Sequence[Tensor], start: int, end: int, device: torch.device) -> tuple[Tensor, Segments | None]:
    """Positions [start, end) of texts that are aligned at their ends: tokens (B, end - start), and where they are real.

    A row shorter than the longest has padding on the left. All rows continue from a state: a fresh state is zero, so
    this also begins a text.
    """
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), end - start, dtype=torch.int64)
    valid = torch.zeros(len(rows), end - start, dtype=torch.bool)
    for b, row in enumerate(rows):
        lead = longest - len(row)
        piece = row[max(start - lead, 0) : max(end - lead, 0)]
        tokens[b, end - start - len(piece) :] = piece
        valid[b, end - start - len(piece) :] = True
    seg = None if bool(valid.all()) else Segments.from_valid(valid.to(device), start=1)
    return tokens.to(device), seg


def chunks(length: int, size: int) -> Iterator[tuple[int, int]]:
    at_least("chunk", size, 1)
    for start in range(0, length, size):
        yield start, min(start + size, length)


def last_logits(model: Any, tokens: Tensor, state: State, seg: Segments | None) -> tuple[Tensor, State]:
    """(logits (B, V) after the last position, state). A model with `prefill` computes no other logits."""
    if hasattr(model, "prefill"):
        return model.prefill(tokens, state, seg)
    logits, state = model.extend(tokens, state, seg)
    return logits[:, -1], state


@torch.no_grad()
def prefill(
    model: Any, rows: Sequence[Tensor], state: State, *, chunk: int = CHUNK, progress: Progress | None = None
) -> tuple[Tensor, State]:
    """Read texts of any lengths (at least one of them not empty) after a state, `chunk` positions at a time.

    Args:
        rows: B tensors (n,) of tokens; an empty one leaves its row's state as it is (and its logits mean nothing).
        state: of B rows; it is consumed.
        chunk: positions per call of the model. What a call needs is proportional to it, whatever the length of the
            text; only caches of attention grow with the text.
        progress: called after each chunk with (positions read, positions in all).

    Returns:
        logits (B, V) after the last token, and the state. Left padding changes neither.
    """
    longest = max(map(len, rows))
    device = device_of(model)
    logits = torch.empty(0)
    for start, end in chunks(longest, chunk):
        tokens, seg = padded(rows, start, end, device)
        logits, state = last_logits(model, tokens, state, seg)
        if progress is not None:
            progress(end, longest)
    ragged = any(len(row) < longest for row in rows)
    return logits, compact(state) if ragged else state


def read(
    model: Any,
    tokens: Sequence[int] | Tensor,
    after: Context | None = None,
    *,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Context:
    """Read a text, or more of one.

    Args:
        model: a causal model (see `generate`) in eval mode.
        tokens: (n,) what to read; n >= 1, or 0 to get `after` itself.
        after: the context that these tokens continue; None: they begin a text.
        chunk, progress: see `prefill`. A chunked reading gives what one pass gives, up to rounding (inside
            `statewise.deterministic()` to the bit), in memory that does not depend on the length.
    """
    piece = as_tokens("tokens", tokens)
    check_vocabulary(model, "tokens", piece)
    if len(piece) == 0:
        if after is None:
            raise ValueError("tokens: want at least one token, got none")
        return after
    if after is None:
        state = fresh_state(model, 1)
    else:
        state = states.clone(states.to(after.state, device_of(model)))
    logits, state = prefill(model, [piece], state, chunk=chunk, progress=progress)
    whole = piece if after is None else torch.cat([after.tokens, piece])
    return Context(whole, state, logits[0])


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def fresh_state(model: Any, rows: int) -> State:
    """The state before any token: float32, or float64 for a model in float64."""
    first = next(model.parameters())
    dtype = torch.promote_types(first.dtype, torch.float32)
    return model.init_state(rows, device=first.device, dtype=dtype)


def compact(state: State) -> State:
    """Without the slots of growing attention caches that no row uses. They come from rows of unequal length."""
    if isinstance(state, KVState):
        used = state.live.any(0)
        if state.live.shape[1] and not bool(used[0]):
            first = int(used.long().argmax()) if bool(used.any()) else len(used)
            # A copy, so that the memory of the longer cache is not kept.
            k, v, live = (t[:, first:].clone() for t in (state.k, state.v, state.live))
            return KVState(k, v, live, state.position)
        return state
    if isinstance(state, tuple):
        parts = [compact(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
