"""The residual block of mamba_ssm: add, norm, mixer, with the sum handed on beside the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._missing import missing
from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn

__all__ = ["Block", "RMSNorm", "layer_norm_fn"]

__getattr__ = missing(__name__)


class Block(nn.Module):
    """residual += hidden_states; hidden_states = mixer(norm(residual)); likewise for the MLP if there is one.

    Args:
        mixer_cls, mlp_cls, norm_cls: called with `dim`; `nn.Identity` for mlp_cls means none.
        fused_add_norm: has no effect on results; without it the norm is called as a module.
        residual_in_fp32: hand on the sum in float32.
    """

    def __init__(
        self, dim: int, mixer_cls, mlp_cls, norm_cls=nn.LayerNorm, fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise TypeError(
                f"Block: fused_add_norm: want norm_cls LayerNorm or RMSNorm, got {type(self.norm).__name__}"
            )

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params=None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        hidden_states, residual = add_norm(self, self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_norm(self, self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **options: Any):
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **options)


def add_norm(owner: Any, norm: Any, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of the sum, and the sum; `owner` has the options of a Block."""
    if owner.fused_add_norm:
        return layer_norm_fn(
            hidden_states, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=True,
            residual_in_fp32=owner.residual_in_fp32, is_rms_norm=isinstance(norm, RMSNorm),
        )  # fmt: skip
    total = hidden_states if residual is None else hidden_states + residual
    hidden_states = norm(total.to(norm.weight.dtype))
    return hidden_states, total.to(torch.float32) if owner.residual_in_fp32 else total
