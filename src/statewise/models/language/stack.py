"""A language model over any causal mixer, or over a list of them.

A plain language model is a preset of this stack; a file of its own is earned by wiring that the stack cannot say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ... import blocks, mixers
from ...mixers.base import CausalMixer
from ...mixers.layers import RMSNorm
from ...mixers.one_step import one_step
from ...segments import Segments
from ...state import State, exportable
from .._specs import Spec, plain, spec_list
from ._causal_lm import CausalLM, Run, check_sizes, run_layer


@exportable
class LanguageState(NamedTuple):
    layers: tuple[State, ...]  # one state per call of a mixer, first layer first


def _causal(name: str, d_model: int, **options: Any) -> CausalMixer:
    built = mixers.create(name, d_model, **options)
    if not isinstance(built, CausalMixer):
        raise ValueError(f"mixer: {name!r} is not causal, so it cannot model language left to right")
    return built


class LanguageModel(CausalLM):
    """Embedding, `n_layer` residual blocks, final norm, output head.

    Args:
        vocab_size: number of tokens V; tokens are integers in [0, V).
        d_model: width D. n_layer: number of blocks.
        mixer: a name from `statewise.mixers.names()`, a dict such as {"name": "mamba2", "d_state": 64}, or a list of
            these: one per layer, or a pattern that repeats, e.g. ["mamba2"] * 3 + ["attention"]. None in a list: that
            block is its feed-forward part alone.
        mlp: the feed-forward part of each block: a name from `statewise.blocks.names()` with options, such as
            {"name": "moe", "hidden": 512, "n_experts": 8, "top_k": 2}, None for none, or a list of these as in `mixer`.
        d_intermediate: hidden width of a gated MLP in each block, rounded up to a multiple of 128; short for `mlp`.
            0 for none.
        tie_embeddings: the output head uses the embedding's weight.
        residual_in_fp32: keep the residual stream in float32 when the weights are in half precision.
        pad_vocab_to: the embedding has V rounded up to a multiple of this many rows; the extra rows are never seen.
        norm_eps: of the norms.
        norm_offset: norms multiply by this plus their weight, which then starts at 1 - norm_offset (1 in Gemma).
        embedding_scale, logit_scale, logit_cap: see `CausalLM`.
        residual_scale: factor on what mixers and feed-forward parts add to the stream.

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
        mixer: Spec | Sequence[Spec] = "mamba2",
        mlp: Spec | Sequence[Spec] = None,
        d_intermediate: int = 0,
        tie_embeddings: bool = True,
        residual_in_fp32: bool = True,
        pad_vocab_to: int = 1,
        norm_eps: float = 1e-5,
        norm_offset: float = 0.0,
        embedding_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
        residual_scale: float = 1.0,
    ):
        check_sizes(("n_layer", n_layer, 0), ("d_intermediate", d_intermediate, 0))
        super().__init__(
            vocab_size, d_model, tie_embeddings=tie_embeddings, pad_vocab_to=pad_vocab_to,
            embedding_scale=embedding_scale, logit_scale=logit_scale, logit_cap=logit_cap,
        )  # fmt: skip
        if mlp is not None and d_intermediate:
            raise ValueError(f"d_intermediate: want 0 where mlp is given, got {d_intermediate}")
        self.config = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layer": n_layer,
            "mixer": plain(mixer),
            "mlp": plain(mlp),
            "d_intermediate": d_intermediate,
            "tie_embeddings": tie_embeddings,
            "residual_in_fp32": residual_in_fp32,
            "pad_vocab_to": pad_vocab_to,
            "norm_eps": norm_eps,
            "norm_offset": norm_offset,
            "embedding_scale": embedding_scale,
            "logit_scale": logit_scale,
            "logit_cap": logit_cap,
            "residual_scale": residual_scale,
        }
        self.residual_in_fp32 = residual_in_fp32
        specs, parts = self.specs()
        self.layers = nn.ModuleList()
        for i, (spec, part) in enumerate(zip(specs, parts)):
            if spec is None and part is None:
                raise ValueError(f"mixer: layer {i} has neither a mixer nor a feed-forward part; want one or both")
            mixing = None if spec is None else _causal(d_model=d_model, **spec)
            feed = None if part is None else blocks.create(d_model=d_model, **part)
            self.layers.append(
                blocks.ResidualBlock(
                    d_model, mixing, feed, norm_eps=norm_eps, norm_offset=norm_offset, scale=residual_scale
                )
            )
        residuals = sum(spec is not None for spec in [*specs, *parts])
        self._finish(RMSNorm(d_model, norm_eps, norm_offset), residuals)

    def specs(self) -> tuple[list[dict[str, Any] | None], list[dict[str, Any] | None]]:
        """For each layer its mixer and its feed-forward part, as {"name": ..., **options} or None."""
        config, n_layer = self.config, self.config["n_layer"]
        if not n_layer:
            return [], []
        hidden = config["d_intermediate"]
        mlp = {"name": "gated", "hidden": hidden} if hidden else config["mlp"]
        return spec_list("mixer", config["mixer"], n_layer), spec_list("mlp", mlp, n_layer)

    @property
    def blocks(self) -> list[blocks.ResidualBlock]:
        return cast("list[blocks.ResidualBlock]", list(self.layers))

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> LanguageState:
        return LanguageState(
            tuple(block.init_state(batch, capacity=capacity, device=device, dtype=dtype) for block in self.blocks)
        )

    def _stream(
        self, x: Tensor, state: LanguageState | None, seg: Segments | None, run: Run
    ) -> tuple[Tensor, LanguageState]:
        if self.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        old = [None] * len(self.layers) if state is None else list(state.layers)
        new: list[State] = []
        while rest := self.blocks[len(new) :]:
            parts = blocks.alike(rest) if run is run_layer else []
            together = one_step(parts, x, old[len(new) : len(new) + len(parts)], seg) if len(parts) > 1 else None
            if together is not None:
                x, states = together
                new += states
                continue
            for block in rest[: max(len(parts), 1)]:
                x, block_state = run(block._run, x, old[len(new)], seg)
                new.append(block_state)
        return x, LanguageState(tuple(new))
