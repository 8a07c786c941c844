"""Lightning modules: a model, its loss, its metrics, and what a batch must look like."""

from .causal_lm import CausalLM, NonFinite, Recall, Task, shown

__all__ = ["CausalLM", "NonFinite", "Recall", "Task", "shown"]
