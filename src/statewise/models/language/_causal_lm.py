"""What all language models share: an embedding in front, a norm and an output head behind, and the verbs."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...mixers.base import Causal
from ...segments import Segments
from ...state import State
from .._weights import Pretrained


class CausalLM(Causal, Pretrained):
    """Tokens (B, L) -> logits (B, L, V). A subclass makes its layers and then calls `_finish`.

    Args:
        vocab_size: number of tokens V; tokens are integers in [0, V). d_model: width D.
        tie_embeddings: the output head uses the embedding's weight.
        pad_vocab_to: the embedding has V rounded up to a multiple of this many rows; the extra rows are never seen.
        embedding_scale: factor on embeddings as they enter the stream.
        logit_scale: factor on logits.
        logit_cap: logits become cap * tanh(logits / cap), after the factor; None: no cap.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        tie_embeddings: bool,
        pad_vocab_to: int = 1,
        embedding_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
    ):
        super().__init__()
        check_sizes(("vocab_size", vocab_size, 1), ("d_model", d_model, 1), ("pad_vocab_to", pad_vocab_to, 1))
        if logit_cap is not None and not logit_cap > 0:
            raise ValueError(f"logit_cap: want a positive number or None, got {logit_cap}")
        self.vocab_size = vocab_size
        self.embedding_scale, self.logit_scale, self.logit_cap = embedding_scale, logit_scale, logit_cap
        rows = -(-vocab_size // pad_vocab_to) * pad_vocab_to
        self.embedding = nn.Embedding(rows, d_model)
        self.tie_embeddings = tie_embeddings

    def _finish(self, norm_f: nn.Module, residuals: int) -> None:
        """Add the final norm and the head, and initialise; `residuals`: how often something is added to the stream."""
        self.norm_f = norm_f
        rows, width = self.embedding.weight.shape
        self.lm_head = None if self.tie_embeddings else nn.Linear(width, rows, bias=False)
        self.reset_parameters(residuals)

    @abstractmethod
    def _stream(self, x: Tensor, state: State, seg: Segments | None) -> tuple[Tensor, State]:
        """All layers: embeddings (B, L, D) to what the final norm takes, and the new state."""

    def _body(self, tokens: Tensor, state: State, seg: Segments | None, last: bool) -> tuple[Tensor, State]:
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            name, got = type(self).__name__, f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"{name}: tokens: want integers (B, L), got {got}")
        x = self.embedding(tokens)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        x, state = self._stream(x, state, seg)
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        logits = linear(self.norm_f((x[:, -1:] if last else x).to(weight.dtype)), weight)[..., : self.vocab_size]
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        if self.logit_cap is not None:
            logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
        return logits, state

    def _run(self, x: Tensor, state: State, seg: Segments | None) -> tuple[Tensor, State]:
        return self._body(x, state, seg, last=False)

    def prefill(self, tokens: Tensor, state: State, seg: Segments | None = None) -> tuple[Tensor, State]:
        """`extend` for a prompt (B, L), L > 0, of which only the end matters: logits (B, V) after the last position.

        The output head is the largest matrix of a small model; here it serves one position instead of L.
        """
        logits, state = self._body(tokens, state, seg, last=True)
        return logits.squeeze(1), state

    def reset_parameters(self, residuals: int) -> None:
        """Model-level initialisation over what the mixers drew: small embeddings, residual outputs scaled by depth."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            elif not name.endswith("mlp.fc2"):  # of all experts at once, each drawn by itself
                continue
            with torch.no_grad():
                parameter.div_(math.sqrt(residuals))
        for module in self.modules():
            # A bias that belongs to the dynamics (the step size's) was drawn on purpose.
            drawn = getattr(module, "dynamics", ())
            for child_name, child in module.named_children():
                if isinstance(child, nn.Linear) and child.bias is not None and f"{child_name}.bias" not in drawn:
                    nn.init.zeros_(child.bias)


def check_sizes(*sizes: tuple[str, int, int]) -> None:
    """Raise unless each (name, value, least) is an integer that is large enough."""
    for name, value, least in sizes:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: want an integer >= {least}, got {value!r}")
