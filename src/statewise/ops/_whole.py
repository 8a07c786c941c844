"""A composite of PyTorch operators as one operator, whose backward pass runs the forward pass once more.

How closed forms cut a row depends on its length, so a program traced through them would serve one length only, and a
loop over chunks would be unrolled. As one operator they serve every length. Compilers gain nothing from looking inside:
the time goes into matrix products and Fourier transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def owned(result: Tensor, *inputs: Tensor | None) -> Tensor:
    """`result` in dense memory of its own, as an operator must return it."""
    result = result.contiguous()
    return result.clone() if any(result is t for t in inputs) else result


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


def gradients(
    run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of all inputs of `run(*inputs)`; for an input that is absent, an empty tensor."""
    given = [None if t is None else t.detach().requires_grad_() for t in inputs]
    wanted = [t for t in given if t is not None]
    with _autograd():
        outputs = run(*given)
        needed = [(o, g) for o, g in zip(outputs, cotangents) if o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in needed], wanted, [g for _, g in needed], allow_unused=True, materialize_grads=True
            )
        )
    return tuple(wanted[0].new_empty(0) if t is None else next(found).contiguous() for t in given)
