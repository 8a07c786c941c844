"""A block of attention and MLP that a model runs at several places with the same weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..mixers.attention import rotate
from ..mixers.layers import RMSNorm
from ..ops.attention import KVBuffer, KVState, attention, attention_cache, attention_positions
from ..segments import Segments


class LowRank(nn.Module):
    """up(down(x)): what one use of a shared linear map adds to it. Nothing at first: `up` starts as zeros."""

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class SharedLinear(nn.Module):
    """A linear map whose weight is shared by `uses` places, each with a low-rank addition of its own (rank 0: none)."""

    def __init__(self, d_in: int, d_out: int, uses: int, rank: int, *, bias: bool = False):
        super().__init__()
        self.shared = nn.Linear(d_in, d_out, bias=bias)
        self.own = nn.ModuleList(LowRank(d_in, d_out, rank) for _ in range(uses if rank else 0))

    def forward(self, x: Tensor, use: int) -> Tensor:
        y = self.shared(x)
        return y + self.own[use](x) if len(self.own) else y


class SharedBlock(nn.Module):
    """Attention and a gated MLP (GeGLU) over [x, embedding], one after the other, with no residual around either.

    run(x, embedding, use, state, seg) is what the block gives at its use number `use`; each use has a state of its own.

    Args:
        d_model: width D of x and of the embedding; attention sees both, side by side.
        uses: how often the block is used.
        n_heads: H; heads are 2 D / H wide. n_kv_heads: a divisor of H; None: H.
        d_intermediate: hidden width of the MLP.
        rank: of the additions that each use makes to the first map of the MLP, and, with `attention_rank`, to the maps
            to queries, keys and values.
        attention_rank: the rank of the latter; 0: none.
        rope: rotary positions. rope_theta: base of their frequencies.
        bias: of the MLP. norm_eps: of the norms.

    Scores are scaled by 1 / sqrt(P / 2), as if half of a head's width P were there.

    Source: Glorioso et al. 2024, "Zamba" (arXiv 2405.16712), section 2, and "The Zamba2 Suite" (arXiv 2411.15242),
    section 2.
    """

    def __init__(
        self,
        d_model: int,
        uses: int,
        *,
        n_heads: int,
        d_intermediate: int,
        n_kv_heads: int | None = None,
        rank: int = 0,
        attention_rank: int = 0,
        rope: bool = False,
        rope_theta: float = 10000.0,
        bias: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        if n_heads < 1 or 2 * d_model % n_heads:
            raise ValueError(f"n_heads: want a divisor of 2 * d_model = {2 * d_model}, got {n_heads}")
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads: want a divisor of n_heads = {n_heads}, got {n_kv_heads}")
        self.n_kv_heads, self.head_dim = n_kv_heads, 2 * d_model // n_heads
        if rope and self.head_dim % 2:
            raise ValueError(f"n_heads: want heads of even width for rope=True, got {n_heads} of {self.head_dim}")
        self.rope, self.rope_theta = rope, rope_theta
        width = n_kv_heads * self.head_dim
        self.norm = RMSNorm(2 * d_model, norm_eps)
        self.q_proj = SharedLinear(2 * d_model, 2 * d_model, uses, attention_rank)
        self.k_proj = SharedLinear(2 * d_model, width, uses, attention_rank)
        self.v_proj = SharedLinear(2 * d_model, width, uses, attention_rank)
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)
        self.norm2 = RMSNorm(d_model, norm_eps)
        self.fc1 = SharedLinear(d_model, 2 * d_intermediate, uses, rank, bias=bias)
        self.fc2 = nn.Linear(d_intermediate, d_model, bias=bias)

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> KVState | KVBuffer:
        device = self.out_proj.weight.device if device is None else device
        return attention_cache(batch, self.n_kv_heads, self.head_dim, capacity=capacity, device=device, dtype=dtype)

    def run(
        self, x: Tensor, embedding: Tensor, use: int, state: KVState | KVBuffer | None, seg: Segments | None
    ) -> tuple[Tensor, KVState | KVBuffer]:
        """x, embedding: (B, L, D) -> (B, L, D), and the state of this use."""
        x = self.norm(torch.cat([x, embedding], -1))
        if seg is not None:
            x = seg.mask(x)
        q, k, v = (
            project(x, use).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope:
            position = attention_positions(state, seg, x.shape[0], x.shape[1], x.device)
            q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        y, state = attention(q, k, v, state=state, seg=seg, scale=math.sqrt(2 / self.head_dim))
        y, gate = self.fc1(self.norm2(self.out_proj(y.flatten(-2))), use).chunk(2, -1)
        return self.fc2(gelu(gate) * y), state
