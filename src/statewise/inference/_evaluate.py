"""How well a model predicts a long sequence, read from beginning to end with its state carried along."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def bits_per_token(model: Any, tokens: Tensor, *, chunk: int = 4096) -> float:
    """Mean of -log2 p(token | all tokens before it) over a sequence of any length, in constant memory.

    Args:
        model: a causal model with `extend`; put it in eval mode first.
        tokens: (n,) integers, n >= 2. The first token has nothing before it and is not counted.
        chunk: tokens per call of `extend`; changes speed and memory, not the result beyond rounding.
    """
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"tokens: want shape (n,) with n >= 2, got {tuple(tokens.shape)}")
    device = next(model.parameters()).device
    state = None
    nats = 0.0
    inputs, targets = tokens[:-1], tokens[1:]
    for x, y in zip(inputs.split(chunk), targets.split(chunk)):
        logits, state = model.extend(x.to(device).long()[None], state)
        nats += float(F.cross_entropy(logits[0].float(), y.to(device).long(), reduction="sum"))
    return nats / math.log(2) / len(targets)
