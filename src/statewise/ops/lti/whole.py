"""`diagonal_ssm` as one operator, for torch.compile and torch.export.

How the closed forms cut a row depends on its length, so a program traced through them would serve one length only, and
the loop over chunks would be unrolled. As an operator a program serves every length. Compilers gain nothing from
looking inside: the time goes into matrix products and Fourier transforms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...segments import Segments


def _run(u, log_a, b, c, D, state, position, valid, conjugate, algorithm) -> tuple[Tensor, Tensor]:
    from . import run

    seg = None if position is None else Segments(position, valid)
    return run(u, log_a, b, c, D, conjugate, state, seg, algorithm)


def forward(
    u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, D: Tensor | None, state: Tensor | None, position: Tensor | None,
    valid: Tensor | None, conjugate: bool, algorithm: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, last = _run(u, log_a, b, c, D, state, position, valid, conjugate, algorithm)
    # An operator must return memory of its own, laid out as its fake says.
    y = y.contiguous()
    return (y.clone() if y is u else y), last.clone(memory_format=torch.contiguous_format)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator, where the dispatcher has left it behind."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys[0], False),
        torch._C._SetExcludeDispatchKeyGuard(keys[1], False),
        torch.enable_grad(),
    ):
        yield


def backward(
    dy: Tensor, dlast: Tensor, u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, D: Tensor | None, state: Tensor | None,
    position: Tensor | None, valid: Tensor | None, conjugate: bool, algorithm: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, log_a, b, c, D and state (empty for absent inputs); the forward pass is run once more."""
    given: list[Any] = [None if t is None else t.detach().requires_grad_() for t in (u, log_a, b, c, D, state)]
    wanted = [t for t in given if t is not None]
    with _autograd():
        u, log_a, b, c, D, state = given
        outputs = _run(u, log_a, b, c, D, state, position, valid, conjugate, algorithm)
        needed = [(o, g) for o, g in zip(outputs, (dy, dlast)) if o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in needed], wanted, [g for _, g in needed], allow_unused=True, materialize_grads=True
            )
        )
    grads = [u.new_empty(0) if t is None else next(found).contiguous() for t in given]
    return tuple(grads)  # type: ignore[return-value]
