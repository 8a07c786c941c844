"""Feature maps that turn a kernel of two vectors into an inner product: phi(q) . phi(k) stands for kernel(q, k)."""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.compiler.assume_constant_result
def _monomials(width: int, degree: int) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
    return _table(width, degree)


@cache
def _table(width: int, degree: int) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
    """The products of `degree` of `width` factors, as sorted index tuples, each with the root of its coefficient in
    (q . k)^degree / degree!: one over the product of the factorials of its exponents."""
    places = tuple(combinations_with_replacement(range(width), degree))
    roots = tuple(math.sqrt(1 / math.prod(math.factorial(p.count(i)) for i in set(p))) for p in places)
    return places, roots


def taylor_width(width: int, order: int) -> int:
    """How many features `taylor_features` makes of vectors of this width: binomial(width + order, order)."""
    return math.comb(width + order, order)


def taylor_features(x: Tensor, order: int) -> Tensor:
    """phi with phi(q) . phi(k) = sum over j <= order of (q . k)^j / j!, the Taylor series of exp(q . k).

    Each monomial occurs once, so x (..., W) becomes (..., binomial(W + order, order)), the constant first. An even
    order keeps every inner product positive.

    Raises:
        ValueError: `order` below 0.

    Source: the feature map of softmax attention in Sieber et al. 2024 (arXiv 2405.15731), section 3.2.
    """
    if order < 0:
        raise ValueError(f"taylor_features: order: want 0 or more, got {order}")
    parts = [torch.ones_like(x[..., :1])]
    for degree in range(1, order + 1):
        places, roots = _monomials(x.shape[-1], degree)
        index = torch.tensor(places, device=x.device)  # (monomials, degree)
        parts.append(x[..., index].prod(-1) * torch.tensor(roots, device=x.device, dtype=x.dtype))
    return torch.cat(parts, -1)


def elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0, entry by entry.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv 2006.16236), equation 7.
    """
    # Not F.elu: this form keeps its digits where x is far below zero.
    return torch.exp(x.clamp(max=0)) + F.relu(x)
