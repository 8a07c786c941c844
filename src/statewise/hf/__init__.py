"""Statewise models as citizens of Hugging Face: Auto classes, `generate`, Trainer, PEFT and lm-eval.

`import statewise.hf` registers the classes with AutoConfig, AutoModel and AutoModelForCausalLM. Needs the extra "hf".
"""

from __future__ import annotations

try:
    import transformers
except ImportError as error:
    raise ImportError("statewise.hf needs transformers: pip install 'statewise[hf]'") from error
try:
    from transformers.cache_utils import Cache

    # Before, a cache was cropped to a length and not by a number of tokens, and passed under other names.
    Cache.activate_past_recording  # noqa: B018
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"statewise.hf works with the caches of transformers 5.24 and later, got {transformers.__version__}: "
        "pip install -U 'statewise[hf]'"
    ) from error

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .adapters import join_projections, lora_targets, split_projections
from .cache import StatewiseCache
from .causal_lm import StatewiseForCausalLM
from .configuration import StatewiseConfig
from .modeling import StatewiseModel
from .tokenizers import byte_tokenizer

__all__ = [
    "StatewiseCache",
    "StatewiseConfig",
    "StatewiseForCausalLM",
    "StatewiseModel",
    "byte_tokenizer",
    "join_projections",
    "lora_targets",
    "split_projections",
]

AutoConfig.register(StatewiseConfig.model_type, StatewiseConfig, exist_ok=True)
AutoModel.register(StatewiseConfig, StatewiseModel, exist_ok=True)
AutoModelForCausalLM.register(StatewiseConfig, StatewiseForCausalLM, exist_ok=True)
