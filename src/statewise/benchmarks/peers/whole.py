"""Whole language models of other libraries with the weights of one of ours.

All have `prefill(tokens)`, which gives the logits of the last position; `start(tokens)` and `step(token)`, which
decode; and, but for llama.cpp, `loss(tokens)` and `parameter(our name)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from ..cases import Missing
from . import want


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of each token given those before it."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


class Ours:
    """Our own model behind the same interface."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._state: Any = None

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.start(tokens)

    def start(self, tokens: Tensor) -> Tensor:
        logits, self._state = self.model.prefill(tokens, None)
        return logits

    def step(self, token: Tensor) -> Tensor:
        logits, self._state = self.model.step(token, self._state)
        return logits

    def loss(self, tokens: Tensor) -> Tensor:
        return next_token_loss(self.model(tokens), tokens)

    def parameter(self, name: str) -> Tensor:
        return self.model.get_parameter(name)


class Transformers:
    """MambaForCausalLM or Mamba2ForCausalLM; asked for the last logits only, as its `generate` does.

    Args:
        model: ours; may be on the meta device if `load` is False.
        load: take over its weights.
    """

    def __init__(self, model: Any, *, load: bool = True) -> None:
        want("transformers")
        import transformers

        config, weights = model.config, model.state_dict()
        mixer = model.blocks[0].mixer
        options = {
            "vocab_size": len(weights["embedding.weight"]),
            "hidden_size": config["d_model"],
            "state_size": mixer.d_state,
            "num_hidden_layers": config["n_layer"],
            "conv_kernel": mixer.conv1d.width,
            "residual_in_fp32": config["residual_in_fp32"],
            "layer_norm_epsilon": config["norm_eps"],
            "tie_word_embeddings": True,
            "use_cache": True,
        }
        theirs: Any
        if config["mixer"] == "mamba":
            theirs = transformers.MambaForCausalLM(
                transformers.MambaConfig(**options, time_step_rank=mixer.dt_rank, expand=2)
            )
        else:
            sizes = {"head_dim": mixer.head_dim, "num_heads": mixer.n_heads, "n_groups": mixer.n_groups}
            theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**options, **sizes, expand=2))
        if load:
            theirs = theirs.to(next(model.parameters()))
            with torch.no_grad():
                for name, p in theirs.named_parameters():
                    p.copy_(weights[_ours(name)].reshape(p.shape))
        self.model, self.vocab_size = theirs, config["vocab_size"]
        self._cache: Any = None

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.start(tokens)

    def start(self, tokens: Tensor) -> Tensor:
        out = self.model(tokens, use_cache=True, logits_to_keep=1)
        self._cache = out.cache
        return out.logits[:, -1, : self.vocab_size]

    def step(self, token: Tensor) -> Tensor:
        return self.model(token[:, None], cache=self._cache, use_cache=True).logits[:, -1, : self.vocab_size]

    def loss(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens, use_cache=False).logits[..., : self.vocab_size]
        return next_token_loss(logits, tokens)

    def parameter(self, name: str) -> Tensor:
        return next(p for n, p in self.model.named_parameters() if _ours(n) == name)


class Accelerated(Transformers):
    """The same model of transformers on our ops, as `statewise.interop.accelerate` makes it; off between its calls."""

    def start(self, tokens: Tensor) -> Tensor:
        with self._on():
            return super().start(tokens)

    def step(self, token: Tensor) -> Tensor:
        with self._on():
            return super().step(token)

    def loss(self, tokens: Tensor) -> Tensor:
        with self._on():
            return super().loss(tokens)

    def _on(self) -> Any:
        from ...interop import accelerate

        return accelerate(self.model.config.model_type, quiet=True)


def _ours(name: str) -> str:
    return name.removeprefix("backbone.").replace("embeddings.", "embedding.")


class MambaPy(nn.Module):
    """mambapy's Mamba between an embedding and a tied head (its own language model wants mamba_ssm at import)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        want("mambapy")
        if model.config["mixer"] != "mamba":
            raise Missing("mambapy: its Mamba-2 needs mamba_ssm")
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm

        config, mixer = model.config, model.blocks[0].mixer
        sizes = {"d_state": mixer.d_state, "d_conv": mixer.conv1d.width, "dt_rank": mixer.dt_rank}
        self.config = MambaConfig(
            d_model=config["d_model"], n_layers=config["n_layer"], rms_norm_eps=config["norm_eps"], **sizes
        )
        weights = model.state_dict()
        self.embedding = nn.Embedding(*weights["embedding.weight"].shape)
        self.mamba, self.norm_f = Mamba(self.config), RMSNorm(config["d_model"], config["norm_eps"])
        self.vocab_size = config["vocab_size"]
        self.to(next(model.parameters()))
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(weights[name.removeprefix("mamba.")].reshape(p.shape))
        self._caches: Any = None

    def _head(self, x: Tensor) -> Tensor:
        return linear(self.norm_f(x), self.embedding.weight)[..., : self.vocab_size]

    def prefill(self, tokens: Tensor) -> Tensor:
        return self._head(self.mamba(self.embedding(tokens))[:, -1])

    def start(self, tokens: Tensor) -> Tensor:
        like = self.embedding.weight
        shape = (len(tokens), self.config.d_inner, self.config.d_conv - 1)
        self._caches = [(None, like.new_zeros(shape)) for _ in range(self.config.n_layers)]
        for t in tokens.unbind(1):
            logits = self.step(t)
        return logits

    def step(self, token: Tensor) -> Tensor:
        x, self._caches = self.mamba.step(self.embedding(token), self._caches)
        return self._head(x)

    def loss(self, tokens: Tensor) -> Tensor:
        return next_token_loss(self._head(self.mamba(self.embedding(tokens))), tokens)

    def parameter(self, name: str) -> Tensor:
        return next(p for n, p in self.named_parameters() if n.removeprefix("mamba.") == name)


BUILDERS = {"transformers": Transformers, "accelerated": Accelerated, "mambapy": MambaPy}


def expected_memory(name: str, model_config: dict[str, Any], tokens: int, backward: bool) -> float:
    """Bytes that a peer is known to need for a row, at least."""
    if model_config["mixer"] != "mamba":
        return 0.0
    one = 4.0 * tokens * 2 * model_config["d_model"] * 16
    layers = model_config["n_layer"]
    counts = {"transformers": (3, 4 * layers + 4), "mambapy": (6, 5 * layers + 6)}.get(name, (0, 0))
    return one * counts[backward]
