"""Matrix products and sums in a fixed order as operators, for `statewise.deterministic`; see `_fixed_numba.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._register import differentiable, operator


def _fake_product(a, b, chain):
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]), dtype=torch.float32)


_product = operator(
    "fixed_product(Tensor a, Tensor b, bool chain) -> Tensor", "statewise.ops._fixed_numba:product", _fake_product
)
_sums = operator("fixed_sums(Tensor x) -> Tensor", "statewise.ops._fixed_numba:sums", lambda x: x.new_empty(x.shape[0]))


def product(a: Tensor, b: Tensor, *, chain: bool = False) -> Tensor:
    """a (n, R, K) times b (n, K, C) -> (n, R, C) in float32, from float32 or half precision.

    Each entry is a chain of multiply-adds in the order of K. It depends on its row of a and its column of b alone.

    Args:
        chain: one chain for all of K, so that terms of zero, wherever they stand, change nothing. Otherwise K is cut
            into stretches, whose sums are added up: more exact for long K.
    """
    return _product(a, b, chain)


def sums(x: Tensor) -> Tensor:
    """Sums of the rows of x (R, K), float32 or float64. Each depends on its row alone."""
    return _sums(x)


def _save(ctx, inputs, output):
    a, b, ctx.chain = inputs
    ctx.save_for_backward(a, b)


def _gradients(ctx, dy):
    a, b = ctx.saved_tensors
    return product(dy, b.mT).to(a.dtype), product(a.mT, dy).to(b.dtype), None


differentiable(_product, _gradients, _save)
