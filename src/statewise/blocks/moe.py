"""A mixture of experts as a position-wise feed-forward part."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..ops._checks import compute_dtype
from .mlp import GatedMLP, activation_named


class MoE(nn.Module):
    """Each position goes through the `top_k` of `n_experts` gated MLPs that a router picks, and through a shared one.

        p = softmax(router(x)) in float32;  y = sum over the chosen e of p_e expert_e(x), + shared(x) if there is one

    No expert has a capacity, so no position is dropped and none depends on another.

    Args:
        d_model: width D. hidden: hidden width of an expert.
        n_experts: E. top_k: experts per position, 1 to E.
        renormalise: divide the weights of the chosen by their sum, which is the softmax over the chosen logits.
        shared_hidden: hidden width of an expert that every position goes through; 0 for none.
        activation: of the gates, see `blocks.mlp.ACTIVATIONS`.

    Weights: `router.weight` (E, D); `fc1` (E, 2 hidden, D), rows [y, gate] as in `GatedMLP`; `fc2` (E, D, hidden).

    Under torch.compile and torch.export every expert sees every position, because which rows an expert gets is not
    known then: E / top_k times the work.

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
        super().__init__()
        for name, value, least in (
            ("hidden", hidden, 1),
            ("n_experts", n_experts, 1),
            ("shared_hidden", shared_hidden, 0),
        ):
            if value < least:
                raise ValueError(f"MoE: {name}: want at least {least}, got {value}")
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"MoE: top_k: want 1 to n_experts = {n_experts}, got {top_k}")
        self.n_experts, self.top_k, self.renormalise = n_experts, top_k, renormalise
        self.activation = activation_named(activation)
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.fc1 = nn.Parameter(torch.empty(n_experts, 2 * hidden, d_model))
        self.fc2 = nn.Parameter(torch.empty(n_experts, d_model, hidden))
        for weight in (self.fc1, self.fc2):
            bound = 1 / math.sqrt(weight.shape[2])  # as nn.Linear draws, expert by expert
            nn.init.uniform_(weight, -bound, bound)
        self.shared = GatedMLP(d_model, shared_hidden, multiple_of=1, activation=activation) if shared_hidden else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts (..., top_k) int64 positions x (..., D) go to, and with what weights, in the compute dtype."""
        p = self.router(x).to(compute_dtype(x)).softmax(-1)
        weight, expert = p.topk(self.top_k, -1)
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        return expert, weight

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        expert, weight = self.route(rows)
        if torch.compiler.is_compiling():
            y = self._everywhere(rows, expert, weight)
        else:
            y = self._where_chosen(rows, expert, weight)
        y = y.to(x.dtype).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        y, gate = linear(x, self.fc1[e]).chunk(2, -1)
        return linear(y * self.activation(gate), self.fc2[e])

    def _where_chosen(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """Rows in the order of their experts, so that each expert works once, on rows side by side."""
        order = expert.flatten().argsort(stable=True)
        counts = (expert.flatten() == torch.arange(self.n_experts, device=x.device)[:, None]).sum(1).tolist()
        gathered = x[order // self.top_k].split(counts)
        outs = torch.cat([self._expert(e, part) for e, part in enumerate(gathered) if len(part)] or [x[:0]])
        # Back to the places of the choices. Sums over them have a fixed order, unlike an index_add.
        outs = outs[order.argsort()].unflatten(0, expert.shape)  # (rows, top_k, D)
        return (outs.to(weight.dtype) * weight[..., None]).sum(1)

    def _everywhere(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        dense = weight.new_zeros(len(x), self.n_experts).scatter(1, expert, weight)
        y = x.new_zeros(x.shape, dtype=weight.dtype)
        for e in range(self.n_experts):
            y = y + self._expert(e, x).to(y.dtype) * dense[:, e : e + 1]
        return y
