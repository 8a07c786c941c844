"""The product of a matrix with a few rows, as in decoding, where reading the matrix is all the work."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .._eager import free

__all__ = ["linear"]

# Above this many rows a product has enough to compute, and PyTorch's own serves best.
ROWS = 16
DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    On CPU without gradients, in float32 or bfloat16, up to sixteen rows take a kernel that reads each weight once, at
    the speed of memory, and adds up in float32. More rows of bfloat16 are multiplied in float32 where the processor
    has no instructions for bfloat16. Everything else is `torch.nn.functional.linear`.

    Args:
        x: (..., K). weight: (O, K). bias: (O,).

    Returns:
        (..., O) in the dtype of x.
    """
    if (
        torch.compiler.is_compiling()  # first: a program must not depend on how many rows there are
        or x.ndim < 2
        or x.numel() == 0
        or x.dtype not in DTYPES
        # The kernel reads memory by these shapes; what else fits, or an error, is PyTorch's.
        or weight.ndim != 2
        or x.shape[-1] != weight.shape[1]
        or (bias is not None and bias.shape != weight.shape[:1])
        or not all(t is None or (t.dtype is x.dtype and t.is_contiguous()) for t in (weight, bias))
        or not free(x, weight, bias)
    ):
        return F.linear(x, weight, bias)
    if x.numel() <= ROWS * x.shape[-1]:
        y = _few_rows()(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    if x.dtype is torch.bfloat16 and not _multiplies_bfloat16():
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


@cache
def _multiplies_bfloat16() -> bool:
    """Whether PyTorch's product of matrices uses instructions for bfloat16. Without them it takes a hundred times as
    long as one in float32. Builds without oneDNN, as on Macs, do not even have the question."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _few_rows() -> Callable:
    from .numba import product

    return product
