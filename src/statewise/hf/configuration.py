"""The configuration of transformers around the constructor arguments of one of our models."""

from __future__ import annotations

import copy
import difflib
import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig

from .._names import check_options, unknown
from ..models._registry import ARCHITECTURES, PRESETS, architecture_class
from ..models.language import CausalLM


def _entry(option: str, doc: str) -> property:
    """An attribute by which other libraries call an option."""

    def read(self: Any) -> Any:
        if option in self.options:
            return self.options[option]
        parameter = inspect.signature(architecture_class(self.architecture)).parameters.get(option)
        if parameter is None or parameter.default is inspect.Parameter.empty:
            raise AttributeError(f"{type(self).__name__} has no {option!r} among its options")
        return parameter.default

    def write(self: Any, value: Any) -> None:
        self.options[option] = value

    return property(read, write, doc=doc)


class StatewiseConfig(PreTrainedConfig):
    """Which architecture, and the keyword arguments of its constructor.

    Args:
        architecture: a registered architecture, e.g. "language".
        options: the keyword arguments of its constructor. They may also be given one by one:
            `StatewiseConfig(vocab_size=256, d_model=64, n_layer=2)`.
        use_cache: whether models return their state unless told otherwise.
        initial_state: the model has a learned state before the first token (see `StatewiseForCausalLM.tune_state`).
        kwargs: entries of transformers' own, e.g. `pad_token_id`.

    `vocab_size`, `hidden_size`, `num_hidden_layers` and `tie_word_embeddings`, which other libraries look for, read and
    write the matching options.
    """

    model_type = "statewise"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ("cache",)

    vocab_size = _entry("vocab_size", "Number of tokens.")
    hidden_size = _entry("d_model", "Width of the model.")
    num_hidden_layers = _entry("n_layer", "Number of blocks.")
    logit_scale = _entry("logit_scale", "Factor on logits.")
    final_logit_softcapping = _entry("logit_cap", "Logits become cap * tanh(logits / cap).")
    tie_word_embeddings = _entry("tie_embeddings", "The output head uses the weight of the embedding.")

    def __init__(
        self,
        architecture: str = "language",
        options: dict[str, Any] | None = None,
        *,
        use_cache: bool = True,
        initial_state: bool = False,
        **kwargs: Any,
    ):
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ValueError(unknown("architecture", str(architecture), ARCHITECTURES))
        if options is not None and not isinstance(options, dict):
            raise TypeError(f"options: want a dict of keyword arguments, got {type(options).__name__}")
        build = architecture_class(architecture)
        if not issubclass(build, CausalLM):
            raise ValueError(f"architecture: {architecture!r} is no language model; load it with statewise.load")
        names = [name for name in inspect.signature(build).parameters if name != "self"]
        check_options(architecture, build, options or {})
        given = {**(options or {}), **{name: kwargs.pop(name) for name in names if name in kwargs}}
        for name in kwargs:
            # transformers keeps whatever it is given; a slip of the pen should not pass for an entry of its own.
            if difflib.get_close_matches(name, names, n=1, cutoff=0.8) and not hasattr(PreTrainedConfig, name):
                raise TypeError(unknown(f"option of {architecture}", name, names))
        self.architecture = architecture
        self.options = copy.deepcopy(given)
        self.use_cache, self.initial_state = use_cache, initial_state
        self.pad_token_id = kwargs.pop("pad_token_id", None)
        self.bos_token_id = kwargs.pop("bos_token_id", None)
        self.eos_token_id = kwargs.pop("eos_token_id", None)
        for name in ("model_type", "statewise_version", "tie_word_embeddings"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> StatewiseConfig:
        """The configuration of one of `statewise.list_models()`, with some options replaced."""
        if name not in PRESETS:
            raise ValueError(unknown("model", name, PRESETS))
        preset = PRESETS[name]
        return cls(preset.architecture, {**preset.config, **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but the configuration of another kind of model is an error and not a warning."""
        found = config_dict.get("model_type")
        if found not in (None, cls.model_type):
            raise ValueError(f"config.json describes a {found!r} model, not {cls.model_type!r}; use AutoConfig")
        if "architecture" not in config_dict:
            raise ValueError("config.json: want 'architecture', as written by save_pretrained of a Statewise model")
        return super().from_dict(config_dict, **kwargs)

    def build(self) -> torch.nn.Module:
        """A new model of ours with random weights. Raises ValueError for options that it cannot be built with."""
        cls = architecture_class(self.architecture)
        try:
            return cls(**copy.deepcopy(self.options))
        except TypeError as error:
            raise ValueError(f"options of {self.architecture!r}: {error}") from error
