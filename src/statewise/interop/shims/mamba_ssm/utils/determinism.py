"""The switch of mamba_ssm for reproducible gradients; the kernels here add up in a fixed order in any case."""

from __future__ import annotations

import torch

from ..._missing import missing

__all__ = ["set_deterministic_mode", "use_deterministic_mode"]

__getattr__ = missing(__name__)

_override: bool | None = None


def use_deterministic_mode() -> bool:
    return torch.are_deterministic_algorithms_enabled() if _override is None else _override


def set_deterministic_mode(value: bool | None) -> None:
    """Override torch's own switch; None takes the override back."""
    global _override
    _override = value
