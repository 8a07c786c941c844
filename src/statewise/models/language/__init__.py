"""Language models."""

from ._causal_lm import CausalLM
from .stack import LanguageModel, LanguageState
from .zamba2 import Zamba2, Zamba2State

__all__ = ["CausalLM", "LanguageModel", "LanguageState", "Zamba2", "Zamba2State"]
