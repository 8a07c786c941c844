"""The attention of mamba_ssm's hybrid models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from ..._missing import missing
from ...causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ._common import depthwise, last_inputs

__all__ = ["MHA"]

__getattr__ = missing(__name__)


class MHA(nn.Module):
    """Self-attention, optionally with a short convolution on queries, keys and values, and a gated MLP beside it.

    Args:
        num_heads_kv: heads of keys and values, shared by neighbouring heads of queries; num_heads if None.
        head_dim: width of a head; embed_dim / num_heads if None.
        mlp_dim: width of both halves of the MLP, rounded up to a multiple of 256; 0 for none.
        softmax_scale: 1 / sqrt(head_dim) if None.
        d_conv: width of the convolution, 0 for none.
        rotary_emb_dim: how many numbers of a head are rotated by position, 0 for none.
        rotary_emb_interleaved: pairs are neighbours (2 i, 2 i + 1); otherwise i and i + half.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, num_heads_kv: int | None = None, head_dim: int | None = None,
        mlp_dim: int = 0, qkv_proj_bias: bool = True, out_proj_bias: bool = True, softmax_scale: float | None = None,
        causal: bool = False, layer_idx: int | None = None, d_conv: int = 0, rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0, rotary_emb_interleaved: bool = False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.embed_dim, self.num_heads, self.layer_idx = embed_dim, num_heads, layer_idx
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv:
            raise ValueError(f"MHA: num_heads_kv: want a divisor of the {num_heads} heads, got {num_heads_kv}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"MHA: num_heads: want a divisor of embed_dim {embed_dim}, got {num_heads}")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.mlp_dim = -(-mlp_dim // 256) * 256
        self.softmax_scale, self.causal, self.d_conv = softmax_scale, causal, d_conv
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        width = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        self.in_proj = nn.Linear(embed_dim, width + self.mlp_dim, bias=qkv_proj_bias, **options)
        if d_conv:
            self.conv1d = depthwise(width, d_conv, True, **options)
        inner = self.head_dim * num_heads + self.mlp_dim // 2
        self.out_proj = nn.Linear(inner, embed_dim, bias=out_proj_bias, **options)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **_: Any):
        """Room for keys and values (B, max_seqlen, 2, heads, width), and the convolution's state (or None)."""
        weight = self.out_proj.weight
        options: dict[str, Any] = {"device": weight.device, "dtype": dtype or weight.dtype}
        conv = torch.zeros(batch_size, len(self.conv1d.weight), self.d_conv, **options) if self.d_conv else None
        return torch.zeros(batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim, **options), conv

    def forward(self, x: Tensor, inference_params=None) -> Tensor:
        """x: (B, L, embed_dim)."""
        start, kv_cache, conv_state = 0, None, None
        if inference_params is not None:
            start = inference_params.seqlen_offset
            states = inference_params.key_value_memory_dict
            if self.layer_idx not in states:
                states[self.layer_idx] = self.allocate_inference_cache(
                    x.shape[0], inference_params.max_seqlen, dtype=x.dtype
                )
            kv_cache, conv_state = states[self.layer_idx]
        qkv, mlp = self.in_proj(x).split([self.in_proj.out_features - self.mlp_dim, self.mlp_dim], -1)
        if self.d_conv:
            qkv = self._convolve(qkv, conv_state, start)
        q, k, v = (
            qkv.unflatten(-1, (-1, self.head_dim))
            .transpose(1, 2)
            .split([self.num_heads, self.num_heads_kv, self.num_heads_kv], 1)
        )
        q, k = self._rotate(q, start), self._rotate(k, start)
        if kv_cache is not None:
            end = start + x.shape[1]
            rows = slice(inference_params.batch_size_offset, inference_params.batch_size_offset + x.shape[0])
            with torch.no_grad():
                kv_cache[rows, start:end] = torch.stack([k, v], 2).permute(0, 3, 2, 1, 4).to(kv_cache.dtype)
            k, v = kv_cache[rows, :end].permute(2, 0, 3, 1, 4).to(q.dtype)
        mask = None
        if self.causal and start and x.shape[1] > 1:  # a chunk that continues: the triangle ends at the last key
            mask = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool, device=x.device).tril(start)
        y = scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal and not start, scale=self.softmax_scale, enable_gqa=True
        )
        y = y.transpose(1, 2).flatten(2)
        if self.mlp_dim:
            up, gate = mlp.chunk(2, -1)
            y = torch.cat([y, up * silu(gate)], -1)
        return self.out_proj(y)

    def _convolve(self, qkv: Tensor, state: Tensor | None, start: int) -> Tensor:
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        qkv = qkv.transpose(1, 2)
        if start and state is not None:
            return causal_conv1d_update(qkv, state, weight, bias).transpose(1, 2)
        if state is not None:
            with torch.no_grad():
                state.copy_(last_inputs(qkv, self.d_conv))
        return causal_conv1d_fn(qkv, weight, bias).transpose(1, 2)

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotate pairs of numbers of x (B, H, L, P) by position times a frequency."""
        if not self.rotary_emb_dim:
            return x
        half = torch.arange(0, self.rotary_emb_dim, 2, device=x.device, dtype=torch.float32) / self.rotary_emb_dim
        at = torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.float32)
        angle = at[:, None] * self.rotary_emb_base**-half
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turned, kept = x.split([self.rotary_emb_dim, x.shape[-1] - self.rotary_emb_dim], -1)
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if self.rotary_emb_interleaved else turned.chunk(2, -1)
        pair = a * cos - b * sin, a * sin + b * cos
        turned = torch.stack(pair, -1).flatten(-2) if self.rotary_emb_interleaved else torch.cat(pair, -1)
        return torch.cat([turned, kept], -1)
