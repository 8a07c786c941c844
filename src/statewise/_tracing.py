"""Whether what runs now is only a computation, or is also written down, transformed or replaced by PyTorch."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """A transform of torch.func, or differentiation forward, is active: PyTorch takes no operators of libraries through
    those."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def untraced() -> bool:
    """No compiler, tracer, dispatch mode or transform of PyTorch is active, and no forward differentiation."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not transformed()
        and torch._C._get_tracing_state() is None
    )
