"""Models of ours as models of transformers."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from .. import state as trees
from ..segments import Segments
from ..state import State
from .cache import StatewiseCache
from .configuration import StatewiseConfig
from .inputs import IGNORED, segments
from .state_tuning import InitialState

_PREFIX = "model."


class StatewisePreTrainedModel(PreTrainedModel):
    """What StatewiseModel and StatewiseForCausalLM have in common."""

    config_class = StatewiseConfig
    config: StatewiseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("ResidualBlock",)
    _supports_attention_backend = False

    @property
    def core(self) -> Any:
        """The model of ours, with `init_state`, `extend`, `step` and `forward(tokens, seg)`; it shares all weights."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        return self.core.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.core.embedding = value

    def init_state(self, batch: int, **options: Any) -> State:
        return self.core.init_state(batch, **options)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        rows = embedding.weight.shape[0]
        if new_num_tokens is not None or rows != self.core.embedding.num_embeddings:
            self._set_vocab_size(rows)
        return embedding

    def _set_vocab_size(self, size: int) -> None:
        """All rows of the embedding are tokens now."""
        self.core.vocab_size = size
        for options in (self.core.config, self.config.options):
            options["vocab_size"] = size
            if "pad_vocab_to" in options:
                options["pad_vocab_to"] = 1

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but weights that are missing or left over are an error that names them.

        `ignore_mismatched_sizes=True` gives missing and wrongly shaped weights random values, as in transformers.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        object.__setattr__(model.base_model, "_fresh", None)
        if kwargs.get("state_dict") is None and not kwargs.get("ignore_mismatched_sizes", False):
            problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
            problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
            if problems:
                shown = "\n  ".join(problems[:20])
                more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
                raise ValueError(f"{pretrained_model_name_or_path}: the weights do not fit this model:\n  {shown}{more}")
        return (model, info) if wants_info else model


class StatewiseModel(StatewisePreTrainedModel):
    """The model below its output head: tokens to features.

    Args:
        config: a StatewiseConfig.
        core: a model of ours to wrap; None builds a new one.
    """

    def __init__(self, config: StatewiseConfig, core: nn.Module | None = None):
        super().__init__(config)
        core = config.build() if core is None else core
        config.options = copy.deepcopy(core.config)  # with what was left to defaults
        missing = [name for name in ("embed", "trunk", "head", "embedding") if not hasattr(core, name)]
        if missing:
            raise ValueError(
                f"architecture {config.architecture!r} is not a language model with embed, trunk and head, so it cannot "
                "be one of transformers; use it as it is"
            )
        # One tree of modules with two faces. Both hold the same dictionaries, so that weights have the same names in
        # both, and a module that is replaced in one (by an adapter, by a quantiser) is replaced in the other.
        self._modules, self._parameters, self._buffers = core._modules, core._parameters, core._buffers
        object.__setattr__(self, "_core", core)
        object.__setattr__(self, "_initial", None)
        self._drawn = not any(p.is_meta for p in core.parameters())
        object.__setattr__(self, "_fresh", None)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def core(self) -> Any:
        return self._core

    def train(self, mode: bool = True) -> StatewiseModel:
        self._core.training = mode
        return super().train(mode)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called for each module that holds weights which no file gave."""
        if self._drawn:
            return
        if self._fresh is None:
            # The constructor drew on the meta device, so a second model has to draw.
            with torch.device("cpu"):
                object.__setattr__(self, "_fresh", dict(self.config.build().named_modules()))
        drawn = self._fresh[next(name for name, m in self.named_modules() if m is module)].state_dict()
        for name, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not getattr(t, "_is_hf_initialized", False):
                t.copy_(drawn[name])

    def settle(self, cache: StatewiseCache) -> StatewiseCache:
        """Run what waits in a cache after `crop`, so that `cache.state` can be read."""
        cache._settle(self._trunk)
        return cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: StatewiseCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Features (B, L, D) of tokens `input_ids` (B, L), or of `inputs_embeds` (B, L, D).

        Args:
            attention_mask, position_ids, seq_idx, cu_seq_lens_q: padding and documents, see `inputs.segments`.
            cache: where to go on from; it is moved on in place.
            use_cache: return the cache (a new one if none was given).
            output_hidden_states: also return what enters each block, and the features.
            logits_to_keep: how many last positions a caller may want to take back (see `StatewiseCache.advance`).
        """
        cache = _cache_of(cache, kwargs)
        _check_rest(type(self).__name__, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: want exactly one of the two")
        x = self._core.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        checkpointed = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and not checkpointed and cache is None:
            cache = StatewiseCache()
        seen = 0 if cache is None else cache.get_seq_length()
        seg = segments(
            x.shape[0], x.shape[1], attention_mask=attention_mask, position_ids=position_ids, seq_idx=seq_idx,
            cu_seq_lens=cu_seq_lens_q, seen=seen, fresh=self._initial is None, device=x.device,
        )  # fmt: skip

        def run(x: Tensor, state: State, seg: Segments | None) -> tuple[list[Tensor], State]:
            return self._trunk(x, state, seg, every=output_hidden_states, checkpointed=checkpointed)

        start = None
        if self._initial is not None and seen == 0:
            start = self._initial(self._core.init_state(1), x.shape[0])
        if cache is None:
            streams, _ = run(x, start, seg)
        else:
            cache.begin(start)
            tail = logits_to_keep if isinstance(logits_to_keep, int) else 0
            streams = cache.advance(run, x, seg, tail=tail)
        output = BaseModelOutputWithPast(
            last_hidden_state=streams[-1],
            cache=cache if use_cache else None,
            hidden_states=tuple(streams) if output_hidden_states else None,
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()

    def _trunk(
        self, x: Tensor, state: State, seg: Segments | None, *, every: bool = False, checkpointed: bool = False
    ) -> tuple[list[Tensor], State]:
        """What enters each block (if `every`) and the features; and the state after."""
        entered = []

        def run(block: Any, x: Tensor, state: State, seg: Segments | None) -> tuple[Tensor, State]:
            if every:
                entered.append(x)
            if checkpointed:
                # Training that recomputes keeps no state.
                return self._gradient_checkpointing_func(lambda x: block._run(x, state, seg)[0], x), None
            return block._run(x, state, seg)

        features, state = self._core.trunk(x, state, seg, run)
        return [*entered, features], state


class StatewiseForCausalLM(StatewisePreTrainedModel, GenerationMixin):
    """A language model of ours with `generate`, a loss and all else that transformers asks for.

    Files written by `save_pretrained` are read by `statewise.load` as well, and the other way round.
    """

    def __init__(self, config: StatewiseConfig, core: nn.Module | None = None):
        super().__init__(config)
        self.model = StatewiseModel(config, core)
        self.initial_state: InitialState | None = None
        if config.initial_state:
            self._attach(InitialState(self.core.init_state(1)))
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.post_init()

    @classmethod
    def wrap(cls, model: nn.Module) -> StatewiseForCausalLM:
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

    def set_output_embeddings(self, value: nn.Module) -> None:
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

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; weights get the names that they have in the model of ours."""
        given = kwargs.pop("state_dict", None)
        weights = self.state_dict() if given is None else given
        plain = {name.removeprefix(_PREFIX): t for name, t in weights.items()}
        super().save_pretrained(save_directory, *args, state_dict=plain, **kwargs)

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
            input_ids, attention_mask, position_ids, _cache_of(cache, kwargs), inputs_embeds, use_cache,
            output_hidden_states, True, seq_idx, cu_seq_lens_q, logits_to_keep, **kwargs,
        )  # fmt: skip
        logits = self.core.head(slice_logits_to_keep(base.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.core.vocab_size, **of_loss)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=base.cache, hidden_states=base.hidden_states, attentions=None
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
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


_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")


class _Head(nn.Linear):
    """The output head as a linear layer of exactly V rows: a view of the embedding, or of a head with more rows."""

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


def _as_dict(return_dict: bool | None, config: StatewiseConfig) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _cache_of(cache: Any, kwargs: dict[str, Any]) -> StatewiseCache | None:
    """The cache, also under its old name."""
    old = kwargs.pop("past_key_values", None)
    cache = old if cache is None else cache
    if cache is not None and not isinstance(cache, StatewiseCache):
        raise TypeError(f"cache: want a StatewiseCache, got {type(cache).__name__}")
    return cache


def _check_rest(model: str, kwargs: dict[str, Any]) -> None:
    """Nothing is swallowed that would have changed the result."""
    for name, value in kwargs.items():
        if name in IGNORED or name == "output_attentions" or value is None:
            continue
        raise TypeError(f"{model}: unexpected argument {name!r}")


def _add_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Names of the model of ours, as in files, become names below `model`."""
    ours = (prefix + _PREFIX, prefix + "initial_state.")
    for name in [n for n in state_dict if n.startswith(prefix) and not n.startswith(ours)]:
        state_dict[prefix + _PREFIX + name.removeprefix(prefix)] = state_dict.pop(name)
