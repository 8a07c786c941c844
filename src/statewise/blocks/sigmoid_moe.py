"""A mixture of experts that scores each expert by itself, with a correction that balances the load."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..ops._precision import widen
from .experts import RoutedExperts
from .mlp import MLP


class SigmoidMoE(RoutedExperts):
    """Each position goes through the `top_k` experts with the highest corrected scores, and through a shared MLP.

        s = sigmoid(router(x)) in float32;  chosen: the top_k of s + correction;  y = sum of w_e expert_e(x) + shared(x)

    with w = s of the chosen, divided by their sum if `renormalise`, times `scale`. The correction only chooses: a
    training loop raises it for experts that get too little and lowers it for others, and no gradient reaches it.

    Args:
        d_model: width D. hidden: hidden width of an expert, which is fc2(activation(fc1(x))).
        n_experts: E. top_k: experts per position, 1 to E.
        groups: experts stand in this many equal groups, of which `top_groups`, those with the highest sum of their two
            best corrected scores, are open to a position.
        renormalise, scale: see above.
        latent: width of what experts take and give, with linear maps from and to D around them; None: D itself.
        shared_hidden: hidden width of the shared MLP, 0 for none.
        activation: see `blocks.mlp.ACTIVATIONS`.
        bias: of the shared MLP and of the maps around the experts.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2, with the experts of Nemotron-H (arXiv 2504.03624) and the
    latent space of Nemotron 3.
    """

    correction: Tensor

    def __init__(
        self,
        d_model: int,
        hidden: int,
        *,
        n_experts: int,
        top_k: int,
        groups: int = 1,
        top_groups: int = 1,
        renormalise: bool = True,
        scale: float = 1.0,
        latent: int | None = None,
        shared_hidden: int = 0,
        activation: str = "relu_squared",
        bias: bool = False,
    ):
        super().__init__(
            d_model if latent is None else latent, hidden, n_experts=n_experts, top_k=top_k, gated=False,
            activation=activation,
        )  # fmt: skip
        if groups < 1 or n_experts % groups or (groups > 1 and n_experts // groups < 2):
            raise ValueError(
                f"SigmoidMoE: groups: want 1, or a divisor of n_experts = {n_experts} that leaves two or more in a "
                f"group, got {groups}"
            )
        if not 1 <= top_groups <= groups or top_groups * (n_experts // groups) < top_k:
            raise ValueError(
                f"SigmoidMoE: top_groups: want 1 to groups = {groups}, with top_k = {top_k} experts in them, "
                f"got {top_groups}"
            )
        self.groups, self.top_groups, self.renormalise, self.scale = groups, top_groups, renormalise, scale
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.register_buffer("correction", torch.zeros(n_experts))
        self.down = None if latent is None else nn.Linear(d_model, latent, bias=bias)
        self.up = None if latent is None else nn.Linear(latent, d_model, bias=bias)
        self.shared = MLP(d_model, shared_hidden, activation=activation, bias=bias) if shared_hidden else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Checkpoints keep the router in float32 whatever the rest is in.
        score = linear(widen(x), self.router.weight.to(widen(x).dtype)).sigmoid()
        choice = score.detach() + self.correction
        if self.groups > 1:
            grouped = choice.unflatten(-1, (self.groups, -1))
            open_to = grouped.topk(2, -1).values.sum(-1).topk(self.top_groups, -1).indices
            shut = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, open_to, False)
            choice = grouped.masked_fill(shut.unsqueeze(-1), -torch.inf).flatten(-2)
        expert = choice.topk(self.top_k, -1).indices
        weight = score.gather(-1, expert)
        if self.renormalise:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return expert, weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        expert, weight = self.route(rows)
        y = self.mix(rows if self.down is None else self.down(rows), expert, weight)
        y = (y if self.up is None else self.up(y)).view_as(x)
        return y if self.shared is None else y + self.shared(x)
