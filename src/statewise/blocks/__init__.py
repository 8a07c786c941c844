"""Residual wiring around mixers, and feed-forward parts."""

from .mlp import GatedMLP
from .residual import ResidualBlock

__all__ = ["GatedMLP", "ResidualBlock"]
