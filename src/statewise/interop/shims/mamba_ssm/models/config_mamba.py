"""The configuration of a mamba_ssm language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..._missing import missing

__all__ = ["MambaConfig"]

__getattr__ = missing(__name__)


@dataclass
class MambaConfig:
    """What config.json of a mamba_ssm checkpoint holds.

    Attributes:
        d_intermediate: width of the MLP of each block, 0 for none.
        ssm_cfg: arguments of the mixer; its "layer" is "Mamba1" (default) or "Mamba2".
        attn_layer_idx, attn_cfg: which layers have attention instead, and the arguments of `MHA`.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
