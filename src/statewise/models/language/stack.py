"""A language model over any causal mixer, or over a list of them.

A plain language model is a preset of this stack; a file of its own is earned by wiring that the stack cannot say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ... import mixers
from ...blocks import GatedMLP, ResidualBlock
from ...mixers.base import Causal, CausalMixer
from ...mixers.layers import RMSNorm
from ...segments import Segments
from ...state import State, exportable
from .._weights import Pretrained

MixerSpec = str | Mapping[str, Any]
# run(block, x, state, seg) -> (x, state)
RunBlock = Callable[[Causal, Tensor, State, Segments | None], tuple[Tensor, State]]


def run_block(block: Causal, x: Tensor, state: State, seg: Segments | None) -> tuple[Tensor, State]:
    """The plain way to run a block of a model."""
    return block._run(x, state, seg)


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


class LanguageModel(Causal, Pretrained):
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
    ):
        super().__init__()
        for name, value, least in (
            ("vocab_size", vocab_size, 1),
            ("d_model", d_model, 1),
            ("n_layer", n_layer, 0),
            ("pad_vocab_to", pad_vocab_to, 1),
            ("d_intermediate", d_intermediate, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: want an integer >= {least}, got {value!r}")
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
        }
        self.vocab_size, self.residual_in_fp32 = vocab_size, residual_in_fp32
        rows = -(-vocab_size // pad_vocab_to) * pad_vocab_to
        self.embedding = nn.Embedding(rows, d_model)
        self.layers = nn.ModuleList()
        for spec in specs:
            options = {k: v for k, v in spec.items() if k != "name"}
            built = mixers.create(spec["name"], d_model, **options)
            if not isinstance(built, CausalMixer):
                raise ValueError(f"mixer: {spec['name']!r} is not causal, so it cannot model language left to right")
            mlp = GatedMLP(d_model, d_intermediate) if d_intermediate else None
            self.layers.append(ResidualBlock(d_model, built, mlp, norm_eps=norm_eps))
        self.norm_f = RMSNorm(d_model, norm_eps)
        self.lm_head = None if tie_embeddings else nn.Linear(d_model, rows, bias=False)
        self.reset_parameters()

    @property
    def blocks(self) -> list[ResidualBlock]:
        return cast(list[ResidualBlock], list(self.layers))

    def reset_parameters(self) -> None:
        """Model-level initialisation over what the mixers drew: small embeddings, residual outputs scaled by depth."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        residuals = len(self.layers) * (2 if self.config["d_intermediate"] else 1)
        for block in self.blocks:
            for name, parameter in block.named_parameters():
                if name.endswith(("out_proj.weight", "fc2.weight")):
                    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                    with torch.no_grad():
                        parameter.div_(math.sqrt(residuals))
            for module in block.modules():
                # A bias that belongs to the dynamics (the step size's) was drawn on purpose.
                drawn = getattr(module, "dynamics", ())
                for child_name, child in module.named_children():
                    if isinstance(child, nn.Linear) and child.bias is not None and f"{child_name}.bias" not in drawn:
                        nn.init.zeros_(child.bias)

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> LanguageState:
        return LanguageState(
            tuple(block.init_state(batch, capacity=capacity, device=device, dtype=dtype) for block in self.blocks)
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) -> embeddings (B, L, D)."""
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"LanguageModel: tokens: want integers (B, L), got {tokens.dtype} {tuple(tokens.shape)}")
        return self.embedding(tokens)

    def trunk(
        self, x: Tensor, state: LanguageState | None, seg: Segments | None, run: RunBlock = run_block
    ) -> tuple[Tensor, LanguageState]:
        """All between the embeddings and the head: x (B, L, D) -> (normed features (B, L, D), state).

        `run` runs one block. Another one may look at what enters a block, or compute it twice to save memory.
        """
        if self.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        states = []
        for i, block in enumerate(self.blocks):
            x, block_state = run(block, x, None if state is None else state.layers[i], seg)
            states.append(block_state)
        return self.norm_f(x.to(self.norm_f.weight.dtype)), LanguageState(tuple(states))

    def head(self, features: Tensor) -> Tensor:
        """What `trunk` gives (..., D) -> logits (..., V)."""
        logits = linear(features, self.embedding.weight) if self.lm_head is None else self.lm_head(features)
        return logits[..., : self.vocab_size]

    def _run(self, x: Tensor, state: LanguageState | None, seg: Segments | None) -> tuple[Tensor, LanguageState]:
        features, state = self.trunk(self.embed(x), state, seg)
        return self.head(features), state

    def prefill(
        self, tokens: Tensor, state: LanguageState | None, seg: Segments | None = None
    ) -> tuple[Tensor, LanguageState]:
        """`extend` for a prompt (B, L), L > 0, of which only the end matters: logits (B, V) after the last position.

        The output head is the largest matrix of a small model; here it serves one position instead of L.
        """
        features, state = self.trunk(self.embed(tokens), state, seg)
        return self.head(features[:, -1]), state
