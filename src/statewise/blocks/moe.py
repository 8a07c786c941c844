"""A mixture of experts as a position-wise feed-forward part."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops._checks import compute_dtype
from .experts import RoutedExperts
from .mlp import GatedMLP


class MoE(RoutedExperts):
    """Each position goes through the `top_k` of `n_experts` gated MLPs that a router picks, and through a shared one.

        p = softmax(router(x)) in float32;  y = sum over the chosen e of p_e expert_e(x), + shared(x) if there is one

    Args:
        d_model: width D. hidden: hidden width of an expert.
        n_experts: E. top_k: experts per position, 1 to E.
        renormalise: divide the weights of the chosen by their sum, which is the softmax over the chosen logits.
        shared_hidden: hidden width of an expert that every position goes through; 0 for none.
        activation: of the gates, see `blocks.mlp.ACTIVATIONS`.

    Weights: `router.weight` (E, D), and those of `RoutedExperts`.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); without renormalising as in Jamba (arXiv 2403.19887); with it, as in
    Mixtral (arXiv 2401.04088); shared expert: DeepSeekMoE (arXiv 2401.06066).
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        *,
        n_experts: int,
        top_k: int,
        renormalise: bool = True,
        shared_hidden: int = 0,
        activation: str = "silu",
    ):
        super().__init__(d_model, hidden, n_experts=n_experts, top_k=top_k, gated=True, activation=activation)
        if shared_hidden < 0:
            raise ValueError(f"MoE: shared_hidden: want at least 0, got {shared_hidden}")
        self.renormalise = renormalise
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.shared = GatedMLP(d_model, shared_hidden, multiple_of=1, activation=activation) if shared_hidden else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.router(x).to(compute_dtype(x)).softmax(-1)
        weight, expert = p.topk(self.top_k, -1)
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        return expert, weight

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.mix(rows, *self.route(rows)).view_as(x)
        return y if self.shared is None else y + self.shared(x)
