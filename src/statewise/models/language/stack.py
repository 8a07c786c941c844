"""A language model over any causal mixer, or over a list of them.

A plain language model is a preset of this stack; a file of its own is earned by wiring that the stack cannot say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ... import mixers
from ...blocks import GatedMLP, ResidualBlock
from ...mixers.base import CausalMixer
from ...mixers.layers import RMSNorm
from ...segments import Segments
from ...state import State, exportable
from .causal_lm import CausalLM, check_sizes

MixerSpec = str | Mapping[str, Any]


@exportable
class LanguageState(NamedTuple):
    layers: tuple[State, ...]  # one state per call of a mixer, first layer first


def mixer_list(mixer: MixerSpec | Sequence[MixerSpec], n_layer: int) -> list[dict[str, Any]]:
    """One {"name": ..., **options} per layer; a shorter list is a pattern that repeats."""
    entries = [mixer] if isinstance(mixer, (str, Mapping)) else list(mixer)
    if not entries or n_layer % len(entries):
        raise ValueError(
            f"mixer: a list of {len(entries)} mixers does not divide n_layer = {n_layer}; give one per layer or a "
            "pattern that repeats"
        )
    specs = []
    for entry in entries:
        spec = {"name": entry} if isinstance(entry, str) else dict(entry)
        if not isinstance(spec.get("name"), str):
            raise ValueError(f"mixer: want a name or a dict with 'name', got {entry!r}")
        specs.append(spec)
    return specs * (n_layer // len(specs))


class LanguageModel(CausalLM):
    """Embedding, `n_layer` residual blocks, final norm, output head.

    Args:
        vocab_size: number of tokens V; tokens are integers in [0, V).
        d_model: width D. n_layer: number of blocks.
        mixer: a name from `statewise.mixers.names()`, a dict such as {"name": "mamba2", "d_state": 64}, or a list of
            these: one per layer, or a pattern that repeats, e.g. ["mamba2"] * 3 + ["attention"].
        d_intermediate: hidden width of a gated MLP in each block, 0 for none.
        tie_embeddings: the output head uses the embedding's weight.
        residual_in_fp32: keep the residual stream in float32 when the weights are in half precision.
        pad_vocab_to: the embedding has V rounded up to a multiple of this many rows; the extra rows are never seen.
        norm_eps: of the norms.
        norm_offset: norms multiply by this plus their weight, which then starts at 1 - norm_offset (1 in Gemma).
        embedding_scale, logit_scale, logit_cap: see `CausalLM`.

    forward(tokens (B, L)) -> logits (B, L, V); `init_state`, `extend` and `step` as in `statewise.mixers.base.Causal`.

    Source: Gu & Dao 2023 (arXiv 2312.00752); initialisation as in GPT-2 for embeddings and residual outputs.
    """

    architecture = "language"

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layer: int,
        *,
        mixer: MixerSpec | Sequence[MixerSpec] = "mamba2",
        d_intermediate: int = 0,
        tie_embeddings: bool = True,
        residual_in_fp32: bool = True,
        pad_vocab_to: int = 1,
        norm_eps: float = 1e-5,
        norm_offset: float = 0.0,
        embedding_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
    ):
        check_sizes(("n_layer", n_layer, 0), ("d_intermediate", d_intermediate, 0))
        super().__init__(
            vocab_size, d_model, tie_embeddings=tie_embeddings, pad_vocab_to=pad_vocab_to,
            embedding_scale=embedding_scale, logit_scale=logit_scale, logit_cap=logit_cap,
        )  # fmt: skip
        specs = mixer_list(mixer, n_layer) if n_layer else []
        self.config = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layer": n_layer,
            "mixer": mixer if isinstance(mixer, str) else specs[0] if isinstance(mixer, Mapping) else list(mixer),
            "d_intermediate": d_intermediate,
            "tie_embeddings": tie_embeddings,
            "residual_in_fp32": residual_in_fp32,
            "pad_vocab_to": pad_vocab_to,
            "norm_eps": norm_eps,
            "norm_offset": norm_offset,
            "embedding_scale": embedding_scale,
            "logit_scale": logit_scale,
            "logit_cap": logit_cap,
        }
        self.residual_in_fp32 = residual_in_fp32
        self.layers = nn.ModuleList()
        for spec in specs:
            options = {k: v for k, v in spec.items() if k != "name"}
            built = mixers.create(spec["name"], d_model, **options)
            if not isinstance(built, CausalMixer):
                raise ValueError(f"mixer: {spec['name']!r} is not causal, so it cannot model language left to right")
            mlp = GatedMLP(d_model, d_intermediate) if d_intermediate else None
            self.layers.append(ResidualBlock(d_model, built, mlp, norm_eps=norm_eps, norm_offset=norm_offset))
        self._finish(RMSNorm(d_model, norm_eps, norm_offset), len(specs) * (2 if d_intermediate else 1))

    @property
    def blocks(self) -> list[ResidualBlock]:
        return cast(list[ResidualBlock], list(self.layers))

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> LanguageState:
        return LanguageState(
            tuple(block.init_state(batch, capacity=capacity, device=device, dtype=dtype) for block in self.blocks)
        )

    def _stream(self, x: Tensor, state: LanguageState | None, seg: Segments | None) -> tuple[Tensor, LanguageState]:
        if self.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        states = []
        for i, block in enumerate(self.blocks):
            x, block_state = block._run(x, None if state is None else state.layers[i], seg)
            states.append(block_state)
        return x, LanguageState(tuple(states))
