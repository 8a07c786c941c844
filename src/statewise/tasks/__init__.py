"""Lightning modules: a model, its loss, its metrics, and what a batch must look like."""

from .causal_lm import CausalLM, NonFinite, Recall, Task, shown
from .classification import Classification, Restoration

__all__ = ["CausalLM", "Classification", "NonFinite", "Recall", "Restoration", "Task", "shown"]
