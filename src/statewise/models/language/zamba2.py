"""Zamba2: a backbone of Mamba-2 with a few blocks of attention and MLP that are used again and again.

It is not a preset of the stack: a shared block is run at several depths, sees the embedding beside the stream, and what
it gives goes into the next mixer but not onto the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ... import mixers
from ...blocks.shared import SharedBlock
from ...mixers.base import CausalMixer
from ...mixers.layers import RMSNorm
from ...segments import Segments
from ...state import State, exportable
from ._causal_lm import CausalLM, check_sizes


@exportable
class Zamba2State(NamedTuple):
    layers: tuple[State, ...]  # one state per layer of the backbone
    shared: tuple[State, ...]  # one per use of a shared block, first use first


class Zamba2Layer(nn.Module):
    """x + mixer(norm(x + extra)): what a shared block gives is seen by the mixer only."""

    def __init__(self, d_model: int, mixer: CausalMixer, *, shared: bool, norm_eps: float):
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.mixer = mixer
        self.from_shared = nn.Linear(d_model, d_model, bias=False) if shared else None

    def run(self, x: Tensor, extra: Tensor | None, state: State, seg: Segments | None) -> tuple[Tensor, State]:
        seen = x
        if self.from_shared is not None and extra is not None:
            seen = x + self.from_shared(extra)
        y, state = self.mixer._run(self.norm(seen), state, seg)
        return x + y, state


class Zamba2(CausalLM):
    """Mamba-2 layers, some of which listen to a shared block of attention and MLP.

    Args:
        vocab_size: number of tokens V. d_model: width D. n_layer: layers of the backbone.
        shared_at: the layers before which a shared block is run, in order, e.g. [5, 11, 17].
        n_shared: number of shared blocks; uses take turns: block 0, 1, ..., n_shared - 1, 0, ...
        mixer: name or {"name": ..., **options} of the causal mixer of the backbone.
        n_heads, n_kv_heads, d_intermediate, rope, rope_theta: of the shared blocks, see `blocks.shared.SharedBlock`.
        rank: of the additions that each use of a shared block makes to its MLP.
        attention_rank: of those it makes to queries, keys and values; 0: none.
        mlp_bias: biases in the MLP of the shared blocks.
        tie_embeddings: the output head uses the embedding's weight.
        norm_eps: of the norms outside of the mixers.

    The stream is in the dtype of the weights.

    Source: Glorioso et al. 2024, "The Zamba2 Suite" (arXiv 2411.15242), section 2.
    """

    architecture = "zamba2"

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layer: int,
        *,
        shared_at: Sequence[int],
        n_heads: int,
        d_intermediate: int,
        n_shared: int = 1,
        mixer: str | Mapping[str, Any] = "mamba2",
        n_kv_heads: int | None = None,
        rank: int = 128,
        attention_rank: int = 0,
        rope: bool = False,
        rope_theta: float = 10000.0,
        mlp_bias: bool = False,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-5,
    ):
        check_sizes(("n_layer", n_layer, 1), ("n_shared", n_shared, 1), ("d_intermediate", d_intermediate, 1))
        check_sizes(("rank", rank, 0), ("attention_rank", attention_rank, 0), ("n_heads", n_heads, 1))
        places = list(shared_at)
        if not places or sorted(set(places)) != places or not (places[0] >= 0 and places[-1] < n_layer):
            raise ValueError(f"shared_at: want layers in [0, {n_layer}) in rising order, got {places}")
        if n_shared > len(places):
            raise ValueError(f"n_shared: want at most the {len(places)} uses in shared_at, got {n_shared}")
        super().__init__(vocab_size, d_model, tie_embeddings=tie_embeddings)
        self.config = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layer": n_layer,
            "shared_at": places,
            "n_shared": n_shared,
            "mixer": mixer if isinstance(mixer, str) else dict(mixer),
            "n_heads": n_heads,
            "n_kv_heads": n_heads if n_kv_heads is None else n_kv_heads,
            "d_intermediate": d_intermediate,
            "rank": rank,
            "attention_rank": attention_rank,
            "rope": rope,
            "rope_theta": rope_theta,
            "mlp_bias": mlp_bias,
            "tie_embeddings": tie_embeddings,
            "norm_eps": norm_eps,
        }
        self.use_at = {layer: use for use, layer in enumerate(places)}
        self.layers = nn.ModuleList()
        for i in range(n_layer):
            options = {"name": mixer} if isinstance(mixer, str) else dict(mixer)
            built = mixers.create(options.pop("name"), d_model, **options)
            if not isinstance(built, CausalMixer):
                raise ValueError(f"mixer: want a causal mixer, got {type(built).__name__}")
            self.layers.append(Zamba2Layer(d_model, built, shared=i in self.use_at, norm_eps=norm_eps))
        self.shared = nn.ModuleList(
            SharedBlock(
                d_model, len(places[i::n_shared]), n_heads=n_heads, n_kv_heads=n_kv_heads,
                d_intermediate=d_intermediate, rank=rank, attention_rank=attention_rank, rope=rope,
                rope_theta=rope_theta, bias=mlp_bias, norm_eps=norm_eps,
            )
            for i in range(n_shared)
        )  # fmt: skip
        self._finish(RMSNorm(d_model, norm_eps), n_layer)

    @property
    def blocks(self) -> list[Zamba2Layer]:
        return cast("list[Zamba2Layer]", list(self.layers))

    def _shared(self, use: int) -> tuple[SharedBlock, int]:
        """The block of a use, and which of the block's own uses it is."""
        own, which = divmod(use, len(self.shared))
        return cast(SharedBlock, self.shared[which]), own

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> Zamba2State:
        of = {"capacity": capacity, "device": device, "dtype": dtype}
        return Zamba2State(
            tuple(layer.mixer.init_state(batch, **of) for layer in self.blocks),
            tuple(self._shared(use)[0].init_state(batch, **of) for use in self.use_at.values()),
        )

    def _stream(self, x: Tensor, state: Zamba2State | None, seg: Segments | None) -> tuple[Tensor, Zamba2State]:
        embedding, layers, shared = x, [], []
        for i, layer in enumerate(self.blocks):
            extra = None
            if i in self.use_at:
                block, own = self._shared(self.use_at[i])
                past = None if state is None else state.shared[self.use_at[i]]
                extra, new = block.run(x, embedding, own, past, seg)
                shared.append(new)
            x, new = layer.run(x, extra, None if state is None else state.layers[i], seg)
            layers.append(new)
        return x, Zamba2State(tuple(layers), tuple(shared))
