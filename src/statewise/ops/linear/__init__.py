"""The product of a matrix with a few rows, as in decoding, where reading the matrix is all the work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._eager import free

__all__ = ["linear"]

# Above this many rows a product has enough to compute, and PyTorch's own serves best.
ROWS = 16
DTYPES = (torch.float32, torch.bfloat16)
_product: Any = None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Up to sixteen rows on CPU without gradients, in float32 or bfloat16 (added up in float32), take a kernel that reads
    each weight once, at the speed of memory; everything else is `torch.nn.functional.linear`.

    Args:
        x: (..., K). weight: (O, K). bias: (O,).

    Returns:
        (..., O) in the dtype of x.
    """
    global _product
    if (
        torch.compiler.is_compiling()  # first: a program must not depend on how many rows there are
        or x.ndim < 2
        or not 0 < x.numel() <= ROWS * x.shape[-1]
        or x.dtype not in DTYPES
        or x.shape[-1] != weight.shape[-1]
        or not all(t is None or (t.dtype is x.dtype and t.is_contiguous()) for t in (weight, bias))
        or not free(x, weight, bias)
    ):
        return torch.nn.functional.linear(x, weight, bias)
    if _product is None:
        from .numba import product as _product
    y = _product(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])
