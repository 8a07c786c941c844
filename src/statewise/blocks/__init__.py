"""Residual wiring around mixers, and feed-forward parts.

Every feed-forward part is `Part(d_model, **options)`. `create("moe", 256, hidden=512, n_experts=8, top_k=2)` builds one
by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .._names import check_options, unknown
from .mlp import MLP, GatedMLP
from .moe import MoE
from .residual import ResidualBlock, alike
from .sigmoid_moe import SigmoidMoE

__all__ = ["MLP", "GatedMLP", "MoE", "ResidualBlock", "SigmoidMoE", "alike", "create", "names"]

# Registry name -> class.
_PARTS: dict[str, type[nn.Module]] = {
    "gated": GatedMLP,
    "mlp": MLP,
    "moe": MoE,
    "sigmoid_moe": SigmoidMoE,
}


def names() -> list[str]:
    """The registered feed-forward parts."""
    return sorted(_PARTS)


def create(name: str, d_model: int, **options: Any) -> nn.Module:
    """Build a feed-forward part by name; an unknown name or option raises with the nearest that exists."""
    if name not in _PARTS:
        raise ValueError(unknown("feed-forward part", name, _PARTS))
    check_options(name, _PARTS[name], options)
    return _PARTS[name](d_model, **options)
