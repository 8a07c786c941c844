"""`diagonal_ssm` as one operator, for torch.compile and torch.export."""

from __future__ import annotations

import torch
from torch import Tensor

from .._whole import gradients, owned
from . import composite


def forward(
    u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, D: Tensor | None, state: Tensor | None, position: Tensor | None,
    valid: Tensor | None, conjugate: bool, algorithm: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, last = composite(u, log_a, b, c, D, state, position, valid, conjugate, algorithm)
    return owned(y, u), last.clone(memory_format=torch.contiguous_format)


def backward(
    dy: Tensor, dlast: Tensor, u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, D: Tensor | None, state: Tensor | None,
    position: Tensor | None, valid: Tensor | None, conjugate: bool, algorithm: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of u, log_a, b, c, D and state (empty for absent inputs); the forward pass is run once more."""

    def run(u, log_a, b, c, D, state) -> tuple[Tensor, Tensor]:
        return composite(u, log_a, b, c, D, state, position, valid, conjugate, algorithm)

    return gradients(run, (u, log_a, b, c, D, state), (dy, dlast))
