"""Language models."""

from .stack import LanguageModel, LanguageState

__all__ = ["LanguageModel", "LanguageState"]
