"""Softmax attention as a mixer: grouped heads, rotary positions, an optional window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.attention import KVBuffer, KVState, attention, attention_cache, attention_matrix, attention_positions
from ..ops.short_conv import short_conv
from ..segments import Segments
from ..state import exportable
from .base import CausalMixer, HasMixing, Mixing, SequenceMixer, check_input
from .layers import Linear, ShortConv

Cache = KVState | KVBuffer


@exportable
class ConvKVState(NamedTuple):
    conv: Tensor  # (B, K-1, (H + 2 Hk) P): last valid inputs of the convolution, oldest first
    cache: Cache


def rotate(x: Tensor, position: Tensor, theta: float, dim: int | None = None) -> Tensor:
    """Rotary position embedding of x (B, L, H, P) at `position` (B, L): channel i is paired with channel i + R/2.

    The angle of pair i is position * theta^(-2 i / R), computed in float32 whatever the dtype of x. R = `dim`: only
    the first R channels turn; None: all P.
    """
    if dim is not None and dim < x.shape[-1]:
        return torch.cat([rotate(x[..., :dim], position, theta), x[..., dim:]], -1)
    half = x.shape[-1] // 2
    # Rounded as everybody rounds it: at position 10^5 the last bit of a rate is a hundredth of a radian.
    rate = 1 / theta ** (torch.arange(half, device=x.device, dtype=torch.float32) / half)
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = (position[..., None, None] * rate).to(wide)  # (B, L, 1, P/2)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(wide).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(CausalMixer, HasMixing):
    """Causal softmax attention with grouped key-value heads, rotary positions and an optional window.

    Args:
        d_model: width D of input and output.
        n_heads: H, query heads; None: d_model / 64, at least 1, or the nearest smaller number that divides d_model.
        n_kv_heads: Hk, key and value heads, a divisor of H; None: H.
        head_dim: P, width of a head; None: d_model / n_heads.
        window: attend only to the last `window` tokens, the current one included; None: to all.
        rope: rotary positions on queries and keys.
        rope_theta: base of the rotary frequencies, > 0.
        rope_dim: R, even: only the first R channels of a head turn; None: all.
        scale: factor on the scores; None: 1 / sqrt(P).
        bias: of the projections. out_bias: of the output projection; None: as `bias`.
        d_conv: K, width of a causal convolution over queries, keys and values, 1 to 8; 0: none.

    The state is a cache of keys and values: it grows, unless `init_state` is given a capacity. With a convolution its
    last inputs stand beside the cache. Positions are counted in
    valid tokens of a document, so padding and packing change nothing.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); grouped heads: Ainslie et al. 2023 (arXiv 2305.13245); rotary
    positions: Su et al. 2021 (arXiv 2104.09864), with halves paired as in Llama.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope: bool = True,
        rope_theta: float = 10000.0,
        rope_dim: int | None = None,
        scale: float | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        d_conv: int = 0,
    ):
        super().__init__()
        if n_heads is None:
            even = rope and head_dim is None and d_model % 2 == 0
            n_heads = max(1, d_model // 64)
            while d_model % n_heads or (even and (d_model // n_heads) % 2):
                n_heads -= 1
        if n_heads < 1 or (head_dim is None and d_model % n_heads):
            raise ValueError(f"Attention: n_heads: want a divisor of d_model = {d_model}, or a head_dim, got {n_heads}")
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"Attention: n_kv_heads: want a divisor of n_heads = {n_heads}, got {n_kv_heads}")
        head_dim = d_model // n_heads if head_dim is None else head_dim
        rotated = head_dim if rope_dim is None else rope_dim
        if head_dim < 1 or (rope and rope_dim is None and head_dim % 2):
            raise ValueError(f"Attention: head_dim: want an even number for rope=True (or rope=False), got {head_dim}")
        if not 0 < rotated <= head_dim or (rope and rotated % 2):
            raise ValueError(f"Attention: rope_dim: want an even number up to head_dim = {head_dim}, got {rope_dim}")
        if window is not None and window < 1:
            raise ValueError(f"Attention: window: want at least 1 token, or None, got {window}")
        if rope_theta <= 0:
            raise ValueError(f"Attention: rope_theta: want a positive base, got {rope_theta}")
        self.d_model, self.n_heads, self.n_kv_heads, self.head_dim = d_model, n_heads, n_kv_heads, head_dim
        self.window, self.scale = window, scale
        self.rope, self.rope_theta, self.rope_dim = rope, rope_theta, rotated
        self.q_proj = Linear(d_model, n_heads * head_dim, bias=bias)
        self.k_proj = Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.out_proj = Linear(n_heads * head_dim, d_model, bias=bias if out_bias is None else out_bias)
        self.conv1d = ShortConv((n_heads + 2 * n_kv_heads) * head_dim, d_conv) if d_conv else None

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> Cache | ConvKVState:
        device = self._device() if device is None else device
        if capacity is not None and self.window is not None:
            # More than the window is never looked at.
            capacity = min(capacity, max(1, self.window - 1))
        cache = attention_cache(batch, self.n_kv_heads, self.head_dim, capacity=capacity, device=device, dtype=dtype)
        if self.conv1d is None:
            return cache
        channels, width = self.conv1d.weight.shape
        return ConvKVState(torch.zeros(batch, width - 1, channels, device=device, dtype=dtype), cache)

    def _project(
        self, x: Tensor, state: Cache | ConvKVState | None, seg: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values as they are attended with, and the state of the convolution if there is one."""
        x = x if seg is None else seg.mask(x)
        conv, cache = state if isinstance(state, ConvKVState) else (None, state)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv1d is not None:
            qkv, conv = short_conv(torch.cat([q, k, v], -1), self.conv1d.weight, self.conv1d.bias, state=conv, seg=seg)
            q, k, v = qkv.split((q.shape[-1], k.shape[-1], v.shape[-1]), -1)
        q = q.unflatten(-1, (self.n_heads, self.head_dim))
        k = k.unflatten(-1, (self.n_kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.n_kv_heads, self.head_dim))
        if self.rope:
            position = attention_positions(cache, seg, x.shape[0], x.shape[1], x.device)
            q, k = (rotate(t, position, self.rope_theta, self.rope_dim) for t in (q, k))
        return q, k, v, conv

    def _emit(self, y: Tensor, seg: Segments | None) -> Tensor:
        y = self.out_proj(y.flatten(-2))
        return y if seg is None else seg.mask(y)

    def _run(
        self, x: Tensor, state: Cache | ConvKVState | None, seg: Segments | None
    ) -> tuple[Tensor, Cache | ConvKVState]:
        check_input(self, x, self.d_model)
        q, k, v, conv = self._project(x, state, seg)
        cache = state.cache if isinstance(state, ConvKVState) else state
        y, cache = attention(q, k, v, state=cache, seg=seg, window=self.window, scale=self.scale)
        return self._emit(y, seg), cache if conv is None else ConvKVState(conv, cache)

    def _whole(self, x: Tensor, seg: Segments | None) -> Tensor:
        check_input(self, x, self.d_model)
        q, k, v, _ = self._project(x, None, seg)
        return self._emit(attention(q, k, v, seg=seg, window=self.window, scale=self.scale, final_state=False)[0], seg)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        q, k, v, _ = self._project(x, None, seg)
        dense = attention_matrix(q, k, seg=seg, window=self.window, scale=self.scale)
        v = v.repeat_interleave(self.n_heads // self.n_kv_heads, 2)
        return Mixing(dense, v, lambda y: self._emit(y, seg))


class BidirectionalAttention(SequenceMixer, HasMixing):
    """Softmax attention in which each token sees its whole document, as in encoders.

    Args:
        d_model: width D of input and output.
        n_heads: H, a divisor of D; None: d_model / 64, at least 1, or the nearest smaller number that fits.
        rope: rotary positions on queries and keys. Without them the mixer does not know the order of its tokens.
        rope_theta: base of the rotary frequencies, > 0.
        bias: of the projections.
        block: local attention: each document is cut into blocks of so many tokens, and a token attends to its own block
            and to the two beside it, so that memory and time grow with the length; None: to the whole document.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; rotary positions: Su et al. 2021 (arXiv 2104.09864);
    blocks: "Never Train from Scratch" (arXiv 2310.02980), which takes 4,096 tokens for Path-X.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        rope: bool = True,
        rope_theta: float = 10000.0,
        bias: bool = True,
        block: int | None = None,
    ):
        super().__init__()
        if block is not None and block < 1:
            raise ValueError(f"BidirectionalAttention: block: want at least 1 token, or None, got {block}")
        self.projections = Attention(d_model, n_heads=n_heads, rope=rope, rope_theta=rope_theta, bias=bias)
        self.d_model, self.block = d_model, block

    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        check_input(self, x, self.d_model)
        q, k, v, _ = self.projections._project(x, None, seg)
        y, _ = attention(q, k, v, seg=seg, causal=False, block=self.block, final_state=False)
        return self.projections._emit(y, seg)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        q, k, v, _ = self.projections._project(x, None, seg)
        dense = attention_matrix(q, k, seg=seg, causal=False, block=self.block)
        return Mixing(dense, v, lambda y: self.projections._emit(y, seg))
