"""Generation: the prompt in one `extend`, then one `step` per token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..segments import Segments

DONE = -1  # what a row yields after its stop token


def _at_least(name: str, value: float, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high:
        limits = f"at least {low}" if high == float("inf") else f"{low} to {high}"
        raise ValueError(f"{name}: want {limits}, got {value}")


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Logits (B, V) with -inf where a token may not be drawn. The likeliest token always stays.

    Args:
        top_k: keep the k likeliest; 0 keeps all.
        top_p: keep the likeliest tokens until their probabilities sum to p (nucleus); 1 keeps all.
        min_p: keep tokens at least p times as likely as the likeliest; 0 keeps all.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        # A token goes if those before it already make up p; the first has none before it.
        outside = p.cumsum(-1) - p >= top_p
        outside[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)
    if min_p > 0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row: logits (B, V) -> (B,) int64. Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    kept = filter_logits(logits.float() / temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator).squeeze(-1)


def _left_padded(prompts: Any, device: torch.device) -> tuple[Tensor, Segments | None]:
    if isinstance(prompts, Tensor):
        tokens = prompts if prompts.ndim == 2 else prompts[None]
        if tokens.ndim != 2 or tokens.shape[1] == 0 or tokens.is_floating_point():
            raise ValueError(f"prompts: want integers (B, L) with L > 0, got {prompts.dtype} {tuple(prompts.shape)}")
        return tokens.to(device), None
    rows = [list(p) for p in prompts]
    if not rows or not all(rows):
        raise ValueError("prompts: want at least one prompt, each of at least one token")
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return tokens, None
    return tokens, Segments.from_lengths([len(row) for row in rows], longest, side="left", device=device)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Tensor | Sequence[Sequence[int]],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Collection[int] = (),
) -> Iterator[Tensor]:
    """Continue prompts, one token per row at a time.

    Args:
        model: has `init_state`, `extend` and `step`, as every causal model here, and perhaps `prefill`, which is then
            used for the prompts; put it in eval mode first.
        prompts: (B, L) tokens, or B lists of tokens of any lengths (padded on the left; the padding changes nothing).
        max_tokens: tokens to make per row.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k, top_p, min_p: see `filter_logits`.
        repetition_penalty: above 1 makes every token that a row holds already less likely: positive logits are divided
            by it, negative multiplied (Keskar et al., "CTRL", 2019).
        seed: of the draws; None continues PyTorch's own random numbers.
        stop: a row ends after any of these tokens.

    Yields:
        (B,) int64; DONE (-1) for rows that have ended. Ends early when all rows have.
    """
    _at_least("max_tokens", max_tokens, 0)
    _at_least("temperature", temperature, 0)
    _at_least("top_k", top_k, 0)
    _at_least("top_p", top_p, 0, 1)
    _at_least("min_p", min_p, 0, 1)
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty: want more than 0, got {repetition_penalty}")
    device = next(model.parameters()).device
    tokens, seg = _left_padded(prompts, device)
    if max_tokens == 0:
        return
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    state = model.init_state(len(tokens), capacity=tokens.shape[1] + max_tokens, device=device)
    if hasattr(model, "prefill"):
        logits, state = model.prefill(tokens, state, seg)
    else:
        logits, state = model.extend(tokens, state, seg)
        logits = logits[:, -1]
    seen = torch.zeros_like(logits, dtype=torch.bool)
    if seg is None or seg.valid is None:
        seen.scatter_(1, tokens, True)
    else:
        for row, (t, v) in enumerate(zip(tokens, seg.valid)):
            seen[row, t[v]] = True
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(stop), dtype=torch.int64, device=device)
    for made in range(1, max_tokens + 1):
        if repetition_penalty != 1:
            scaled = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(seen, scaled, logits)
        token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, generator=generator)
        seen.scatter_(1, token[:, None], True)
        yield token.masked_fill(ended, DONE)
        ended |= torch.isin(token, stops)
        if made == max_tokens or bool(ended.all()):
            return
        logits, state = model.step(token, state)
