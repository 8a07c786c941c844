"""Models of ours as models of transformers."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..models.language._causal_lm import CausalLM, Layer
from ..segments import Segments
from ..state import State
from .cache import StatewiseCache
from .configuration import StatewiseConfig
from .inputs import IGNORED, segments
from .state_tuning import InitialState


class StatewisePreTrainedModel(PreTrainedModel):
    """What StatewiseModel and StatewiseForCausalLM have in common."""

    config_class = StatewiseConfig
    config: StatewiseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]  # noqa: RUF012
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

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        before = self.core.embedding.num_embeddings
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        rows = embedding.num_embeddings
        if new_num_tokens is not None or rows != before:
            # All rows are tokens now.
            self.core.vocab_size = rows
            for options in (self.core.config, self.config.options):
                options["vocab_size"] = rows
                if "pad_vocab_to" in options:
                    options["pad_vocab_to"] = 1
        return embedding

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but weights that are missing or left over are an error that names them.

        `ignore_mismatched_sizes=True` gives missing and wrongly shaped weights random values, as in transformers.
        Pickled weights are read only with `use_safetensors=False`, and then without running what is in them.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs = {"use_safetensors": True, **kwargs, "output_loading_info": True}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, info = loaded
        object.__setattr__(model.base_model, "_fresh", None)
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise ValueError(
                "device_map: want one device, e.g. 'cuda:0': blocks are not called as modules, so the hooks that would "
                f"move tensors between devices do not run; got {model.hf_device_map}"
            )
        if kwargs.get("state_dict") is None and not kwargs.get("ignore_mismatched_sizes", False):
            problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
            problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
            if problems:
                shown = "\n  ".join(problems[:20])
                more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
                raise ValueError(
                    f"{pretrained_model_name_or_path}: the weights do not fit this model:\n  {shown}{more}"
                )
        return (model, info) if wants_info else model


class StatewiseModel(StatewisePreTrainedModel):
    """The model below its output head: tokens to features.

    Args:
        config: a StatewiseConfig.
        core: a model of ours to wrap; None builds a new one.
    """

    _core: Any
    _initial: InitialState | None
    _fresh: dict[str, nn.Module] | None

    def __init__(self, config: StatewiseConfig, core: Any = None):
        super().__init__(config)
        core = config.build() if core is None else core
        if not isinstance(core, CausalLM):
            raise ValueError(f"architecture {config.architecture!r} is not a causal language model; use it as it is")
        config.options = copy.deepcopy(core.config)  # with what was left to defaults
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
        assert self._fresh is not None
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
        cache = cache_of(cache, kwargs)
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
        return output if as_dict(return_dict, self.config) else output.to_tuple()

    def _trunk(
        self, x: Tensor, state: State, seg: Segments | None, *, every: bool = False, checkpointed: bool = False
    ) -> tuple[list[Tensor], State]:
        """What enters each block (if `every`) and the features; and the state after."""
        entered = []

        def run(layer: Layer, x: Tensor, state: State, seg: Segments | None) -> tuple[Tensor, State]:
            if every:
                entered.append(x)
            if checkpointed:
                return self._gradient_checkpointing_func(lambda x: layer(x, state, seg), x)
            return layer(x, state, seg)

        features, state = self._core.trunk(x, state, seg, run)
        return [*entered, features], state


def as_dict(return_dict: bool | None, config: StatewiseConfig) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def cache_of(cache: Any, kwargs: dict[str, Any]) -> StatewiseCache | None:
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
