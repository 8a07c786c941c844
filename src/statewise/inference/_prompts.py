"""What `generate` starts from: token lists of any lengths and contexts that were read before, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import state as states
from ..state import State
from ._reading import Context, Progress, as_tokens, check_vocabulary, device_of, fresh_state, prefill

Prompt = Sequence[int] | Tensor | Context


def check_prompts(model: Any, prompts: Any) -> list[Context | Tensor]:
    """Each prompt as a context or as checked tokens (n,), n >= 1."""
    if isinstance(prompts, Context):
        prompts = [prompts]
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (1, 2):
            raise ValueError(f"prompts: want integers (B, L) or (L,), got {prompts.dtype} {tuple(prompts.shape)}")
        prompts = prompts[None] if prompts.ndim == 1 else prompts
    given = list(prompts)
    if not given:
        raise ValueError("prompts: want at least one prompt, got none")
    if isinstance(given[0], int):
        raise ValueError("prompts: want a list of prompts, got a list of tokens; wrap it: [tokens]")
    out: list[Context | Tensor] = []
    for i, prompt in enumerate(given):
        name = f"prompts: row {i}"
        if not isinstance(prompt, Context):
            prompt = as_tokens(name, prompt)
            if not len(prompt):
                raise ValueError(f"{name}: want at least one token, got none")
            check_vocabulary(model, name, prompt)
        out.append(prompt)
    return out


@torch.no_grad()
def read_all(
    model: Any, prompts: list[Context | Tensor], chunk: int, progress: Progress | None
) -> tuple[State, Tensor]:
    """(state, logits (B, V)) after the prompts, read side by side; contexts are read already."""
    rows = [prompt for prompt in prompts if not isinstance(prompt, Context)]
    new = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, Context)]
    parts: list[State] = [None] * len(prompts)
    logits: list[Tensor] = [torch.empty(0)] * len(prompts)
    if new:
        after, state = prefill(model, rows, fresh_state(model, len(new)), chunk=chunk, progress=progress)
        if len(new) == len(prompts):
            return state, after
        for b, i in enumerate(new):
            parts[i], logits[i] = states.select(state, [b]), after[b]
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, Context):
            device = device_of(model)
            parts[i], logits[i] = states.to(prompt.state, device), prompt.logits.to(device)
    return states.merge(parts), torch.stack(logits)  # both are copies: a context stays what it is
