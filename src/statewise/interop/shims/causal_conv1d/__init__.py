"""Stands in for causal-conv1d."""

from .._missing import missing
from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
__version__ = "1.6.1+statewise"

__getattr__ = missing(__name__)
