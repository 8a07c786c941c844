"""From the layouts and conventions of mamba_ssm and causal-conv1d to those of `statewise.ops`, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops._checks import complex_dtype, compute_dtype, real_dtype
from ...segments import Segments

UNLIMITED = (0.0, math.inf)


def fit(lead: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """`others` in a dtype that goes with `lead`; only ever widened (float64 beside float32 stays an error of the op).

    The kernels of the originals read float32 parameters whatever the activations are, so callers cast to float32 even
    in float64, and under autocast some activations arrive in half precision and some not.
    """
    want = compute_dtype(lead)

    def one(t: Tensor | None) -> Tensor | None:
        if t is None or t.dtype == lead.dtype:
            return t
        real = real_dtype(t.dtype)
        if torch.promote_types(real, want) != want or real == want:
            return t
        return t.to(complex_dtype(want) if t.is_complex() else want)

    return tuple(one(t) for t in others)


def documents(seq_idx: Tensor | None, *, continues: bool = False) -> Segments | None:
    """Segments from `seq_idx` (B, L): a change of index starts a document, a negative index is padding.

    Args:
        continues: there is a state from before; as in mamba_ssm it belongs to the document with index 0.
    """
    if seq_idx is None:
        return None
    seg = Segments.from_documents(seq_idx)
    if not continues:
        return seg
    first = (seq_idx != 0).long().cumsum(1) == 0
    return Segments(seg.position + first.long(), seg.valid)


def conv_activation(activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation: want None, 'silu' or 'swish', got {activation!r}")
    return None if activation is None else "silu"


def limits(dt_limit: Sequence[float], dt_softplus: bool) -> tuple[float, float] | None:
    """dt_limit of `statewise.ops`: None where the clamp would change nothing."""
    low, high = (float(x) for x in dt_limit)
    return None if dt_softplus and (low, high) == UNLIMITED else (low, high)


def like(y: Tensor, x: Tensor) -> Tensor:
    """`y` (B, D, L), laid out in memory as `x` is: channels or positions side by side."""
    return y if x.stride(1) == 1 and x.stride(2) != 1 else y.contiguous()


def gradients(
    run: Callable[..., Sequence[Tensor] | Tensor], inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    """Gradients of `run(*inputs)` by running it again, and its outputs.

    The low-level backward functions of the originals get what their forward saved; ours compute it anew.

    Returns:
        one gradient for each input (None for None), and the outputs.
    """
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        outputs = run(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        wanted = [t for t in leaves if t is not None]
        ends, given = zip(*((y, g.to(y.dtype)) for y, g in zip(outputs, cotangents) if g is not None))
        found = iter(torch.autograd.grad(ends, wanted, given, allow_unused=True, materialize_grads=True))
    return tuple(None if t is None else next(found) for t in leaves), tuple(y.detach() for y in outputs)
