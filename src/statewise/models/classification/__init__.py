"""Models that put a label on a sequence, or on each of its positions."""

from .sequence import SequenceClassifier

__all__ = ["SequenceClassifier"]
