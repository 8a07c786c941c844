"""Language models of ours as language models of transformers."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from .. import state as trees
from ..state import State
from .cache import StatewiseCache
from .configuration import StatewiseConfig
from .modeling import StatewiseModel, StatewisePreTrainedModel, as_dict, cache_of
from .state_tuning import InitialState

_PREFIX = "model."
_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")


class StatewiseForCausalLM(StatewisePreTrainedModel, GenerationMixin):
    """A language model of ours with `generate`, a loss and all else that transformers asks for.

    Files written by `save_pretrained` are read by `statewise.load` as well, and the other way round.
    """

    def __init__(self, config: StatewiseConfig, core: Any = None):
        super().__init__(config)
        self.model = StatewiseModel(config, core)
        self.initial_state: InitialState | None = None
        if config.initial_state:
            self._attach(InitialState(self.core.init_state(1)))
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.post_init()

    @classmethod
    def wrap(cls, model: Any) -> StatewiseForCausalLM:
        """Around a model of `statewise.load` or `statewise.create_model`: the same modules and weights, no copy."""
        if not hasattr(model, "architecture") or not hasattr(model, "config"):
            raise TypeError(f"model: want a model of statewise.load or create_model, got {type(model).__name__}")
        wrapped = cls(StatewiseConfig(model.architecture, dict(model.config)), model)
        return wrapped.train(model.training)

    @property
    def core(self) -> Any:
        return self.model.core

    def tune_state(self, start: State = None) -> StatewiseForCausalLM:
        """Freeze all weights and learn the state before the first token instead, from `start` (one row) or from zeros.

        The learned state is saved with the model. `learned_state()` gives it for use with any other way to run it.
        """
        self.requires_grad_(False)
        self._attach(InitialState(self.core.init_state(1) if start is None else start))
        self.config.initial_state = True
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, InitialState):
            for p in module.parameters():
                p.zero_()

    def _attach(self, initial: InitialState) -> None:
        # The trunk sees it but does not hold it: it is no weight of the model of ours.
        self.initial_state = initial.to(self.device)
        object.__setattr__(self.model, "_initial", self.initial_state)

    def learned_state(self) -> State:
        """The state of `tune_state`, a tree of one row, e.g. for `statewise.state.save`."""
        if self.initial_state is None:
            raise ValueError("no state was tuned; call tune_state() and train first")
        return trees.clone(trees.detach(self.initial_state(self.core.init_state(1))))

    def get_output_embeddings(self) -> nn.Linear:
        head = self.core.lm_head
        if head is not None and head.weight.shape[0] == self.core.vocab_size:
            return head
        return _Head(self.core)

    def set_output_embeddings(self, value: Any) -> None:
        if self.core.lm_head is not None:
            self.core.lm_head = value
        elif value.weight.shape != self.core.embedding.weight.shape:
            raise ValueError(
                "the output head is the embedding (tie_embeddings=True): want a layer with a weight "
                f"{tuple(self.core.embedding.weight.shape)} to be tied to it, got {tuple(value.weight.shape)}"
            )

    def settle(self, cache: StatewiseCache) -> StatewiseCache:
        """Run what waits in a cache after `crop`, so that `cache.state` can be read."""
        return self.model.settle(cache)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers; weights get the names that they have in the model of ours."""
        weights = self.state_dict() if state_dict is None else state_dict
        plain = {name.removeprefix(_PREFIX): t for name, t in weights.items()}
        super().save_pretrained(save_directory, is_main_process, plain, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: StatewiseCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, L, V) and, with `labels` (B, L), the loss of each next token; labels of -100 do not count.

        Args:
            logits_to_keep: logits of the last n positions only (0: of all), or of the given positions.
            kwargs: `num_items_in_batch` and others of the loss. See `StatewiseModel.forward` for the rest.
        """
        of_loss = {name: kwargs.pop(name) for name in _LOSS_OPTIONS if name in kwargs}
        base = self.model(
            input_ids, attention_mask, position_ids, cache_of(cache, kwargs), inputs_embeds, use_cache,
            output_hidden_states, True, seq_idx, cu_seq_lens_q, logits_to_keep, **kwargs,
        )  # fmt: skip
        logits = self.core.head(slice_logits_to_keep(base.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.core.vocab_size, **of_loss)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=base.cache, hidden_states=base.hidden_states, attentions=None
        )
        return output if as_dict(return_dict, self.config) else output.to_tuple()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *_: Any) -> None:  # type: ignore[override]
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: want None (the state of the model is the cache), got {wanted!r}")
        given = model_kwargs.get("cache")
        if given is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = StatewiseCache()
        elif given is not None:
            model_kwargs["cache"]._is_user_defined = True
        if generation_config.is_assistant and model_kwargs.get("cache") is not None:
            model_kwargs["cache"].activate_past_recording()


class _Head(nn.Linear):
    """The output head as a linear layer of exactly V rows: a view of the embedding, or of a head with more rows."""

    _core: Any

    def __init__(self, core: Any):
        nn.Module.__init__(self)
        object.__setattr__(self, "_core", core)
        self.in_features, self.out_features = core.embedding.weight.shape[1], core.vocab_size

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        holder = self._core.embedding if self._core.lm_head is None else self._core.lm_head
        return holder.weight[: self.out_features]

    @property
    def bias(self) -> None:  # type: ignore[override]
        return None


def _add_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Names of the model of ours, as in files, become names below `model`."""
    ours = (prefix + _PREFIX, prefix + "initial_state.")
    for name in [n for n in state_dict if n.startswith(prefix) and not n.startswith(ours)]:
        state_dict[prefix + _PREFIX + name.removeprefix(prefix)] = state_dict.pop(name)
