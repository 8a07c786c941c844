"""RG-LRU: the gated linear recurrent unit of Griffin and RecurrentGemma, with its convolution and output gate."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._precision import widen
from ..ops.linear_scan import linear_scan, linear_scan_matrix
from ..ops.short_conv import short_conv
from ..segments import Segments
from ..state import exportable
from .base import CausalMixer, HasMixing, Mixing, check_input
from .layers import ShortConv

# With the recurrence gate wide open a channel decays C times as fast per token as its parameter says.
C = 8.0
# Bound on the slope of the square root of the input scale, which is infinite at 0.
MAX_SLOPE = 1000.0


@exportable
class RGLRUState(NamedTuple):
    conv: Tensor  # (B, K-1, D_rnn): last valid inputs of the convolution, oldest first
    h: Tensor  # (B, D_rnn)
    begun: Tensor  # (B,) bool: the document under way has had a token


class BlockLinear(nn.Module):
    """A linear map with a block-diagonal matrix: each of H blocks of W channels is mapped on its own.

    weight (H, W_in, W_out), bias (H, W_out). x (..., H W) -> (..., H W).
    """

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(blocks, width // blocks, width // blocks) / math.sqrt(width // blocks))
        self.bias = nn.Parameter(torch.zeros(blocks, width // blocks))

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, self.bias.shape)
        return (torch.einsum("...hi,hij->...hj", blocks, self.weight) + self.bias).flatten(-2)


def sqrt_bounded(x: Tensor) -> Tensor:
    """sqrt(x) for x >= 0, with a slope of at most MAX_SLOPE."""
    steep = x < 0.25 / MAX_SLOPE**2
    line = MAX_SLOPE * x
    # The value of the root, the slope of the line; `where` on the inside keeps infinite slopes out of the gradient.
    root = torch.where(steep, 1.0, x).sqrt()
    return torch.where(steep, line + (x.clamp(min=0).sqrt() - line).detach(), root)


class RGLRU(CausalMixer, HasMixing):
    """Recurrent block of Griffin: a short convolution, a gated diagonal recurrence, and a GeLU gate over its output.

    In each of D_rnn channels, with gates r_t and i_t in (0, 1) computed from the convolved input x_t:

        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t,    a_t = exp(-8 softplus(Lambda) r_t)

    The first token of a document enters unscaled, h_0 = i_0 x_0. As everywhere in this library that is the token
    at position 0 of a `Segments`, and the first valid token that a new state sees.

    Args:
        d_model: width D of input and output.
        d_rnn: inner width; None: d_model.
        n_blocks: H, blocks of the block-diagonal gates, a divisor of d_rnn; None: the largest divisor up to 16.
        d_conv: K, width of the convolution, 1 to 8.
        a_range: (low, high) in (0, 1): exp(-softplus(Lambda)) starts with its square uniform between their squares.

    Source: De et al. 2024, "Griffin" (arXiv 2402.19427), sections 2.3 and 2.4; the parameters are drawn as by the
    released RecurrentGemma (arXiv 2404.07839).
    """

    dynamics: ClassVar[frozenset[str]] = frozenset({"Lambda"})

    def __init__(
        self,
        d_model: int,
        *,
        d_rnn: int | None = None,
        n_blocks: int | None = None,
        d_conv: int = 4,
        a_range: tuple[float, float] = (0.9, 0.999),
    ):
        super().__init__()
        d_rnn = d_model if d_rnn is None else d_rnn
        if n_blocks is None:
            n_blocks = max(n for n in range(1, 17) if d_rnn % n == 0)
        if n_blocks < 1 or d_rnn % n_blocks:
            raise ValueError(f"RGLRU: n_blocks: want a divisor of d_rnn = {d_rnn}, got {n_blocks}")
        low, high = a_range
        if not 0 < low <= high < 1:
            raise ValueError(f"RGLRU: a_range: want 0 < low <= high < 1, got {a_range}")
        self.d_model, self.d_rnn = d_model, d_rnn
        self.x_proj = nn.Linear(d_model, d_rnn)
        self.gate_proj = nn.Linear(d_model, d_rnn)
        self.conv1d = ShortConv(d_rnn, d_conv)
        self.input_gate = BlockLinear(d_rnn, n_blocks)
        self.recurrence_gate = BlockLinear(d_rnn, n_blocks)
        rate = -0.5 * torch.empty(d_rnn).uniform_(low**2, high**2).log()
        self.Lambda = nn.Parameter(rate.expm1().log())  # softplus of it is the rate
        self.out_proj = nn.Linear(d_rnn, d_model)

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> RGLRUState:
        device = self._device() if device is None else device
        return RGLRUState(
            torch.zeros(batch, self.conv1d.width - 1, self.d_rnn, device=device, dtype=dtype),
            torch.zeros(batch, self.d_rnn, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.bool),
        )

    def _coefficients(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Decay per step in (0, 1], and the factor on the input: (B, L, D_rnn), wide. first: (B, L) bool."""
        log_a = -C * F.softplus(widen(self.Lambda)) * torch.sigmoid(widen(self.recurrence_gate(x)))
        # 1 - a^2 as it is, where a is so near 1 that rounding a would leave nothing of it.
        scale = sqrt_bounded(-torch.expm1(2 * log_a))
        scale = torch.where(first.unsqueeze(-1), 1.0, scale)
        return log_a.exp(), scale * torch.sigmoid(widen(self.input_gate(x)))

    def _convolve(self, x: Tensor, state: Tensor | None, seg: Segments | None) -> tuple[Tensor, Tensor]:
        return short_conv(self.x_proj(x), self.conv1d.weight, self.conv1d.bias, state=state, seg=seg)

    def _emit(self, h: Tensor, x: Tensor, seg: Segments | None) -> Tensor:
        y = self.out_proj(h * F.gelu(self.gate_proj(x), approximate="tanh"))
        return y if seg is None else seg.mask(y)

    def _run(self, x: Tensor, state: RGLRUState | None, seg: Segments | None) -> tuple[Tensor, RGLRUState]:
        check_input(self, x, self.d_model)
        if seg is not None:
            x = seg.mask(x)
        conv, h, begun = (None, None, None) if state is None else state
        u, conv = self._convolve(x, conv, seg)
        first, begun = first_tokens(begun, seg, x)
        a, scale = self._coefficients(u, first)
        y, h = linear_scan(a, scale * u, state=h, seg=seg)
        return self._emit(y.to(u.dtype), x, seg), RGLRUState(conv, h, begun)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        if seg is not None:
            x = seg.mask(x)
        u, _ = self._convolve(x, None, seg)
        a, scale = self._coefficients(u, first_tokens(None, seg, x)[0])
        dense = linear_scan_matrix(a, seg=seg) * scale.mT.unsqueeze(-2)
        return Mixing(dense, u.unsqueeze(-1), lambda h: self._emit(h.squeeze(-1).to(u.dtype), x, seg))


def first_tokens(begun: Tensor | None, seg: Segments | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens of x (B, L, ...) are the first of their document, (B, L) bool, and `begun` after them."""
    B, L = x.shape[:2]
    begun = torch.zeros(B, dtype=torch.bool, device=x.device) if begun is None else begun
    if seg is None:
        first = torch.arange(L, device=x.device) == 0
        return first & ~begun[:, None], begun | (L > 0)
    valid = torch.ones_like(seg.resets) if seg.valid is None else seg.valid
    # A row that goes on with a document nothing of which was seen begins at its first valid token.
    earliest = valid & (valid.cumsum(1) == 1)
    return seg.resets | (earliest & ~begun[:, None]), begun | valid.any(1)
