"""Feed-forward maps of which a router picks a few for each position."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .._tracing import transformed
from ..ops.linear import linear
from .mlp import activation_named


class RoutedExperts(nn.Module, ABC):
    """E experts; a subclass says who goes where. No expert has a capacity: nothing is dropped, no row sees another.

    Args:
        d_in: width of what experts take and give. hidden: hidden width of an expert.
        n_experts: E. top_k: experts per position, 1 to E.
        gated: experts are fc2(y * activation(gate)) with [y, gate] = fc1(x), not fc2(activation(fc1(x))).

    Weights: `fc1` (E, 2 hidden or hidden, D), rows [y, gate] as in `GatedMLP`; `fc2` (E, D, hidden).

    Under torch.compile and torch.export every expert sees every position, because which rows an expert gets is not
    known then: E / top_k times the work.
    """

    def __init__(self, d_in: int, hidden: int, *, n_experts: int, top_k: int, gated: bool, activation: str):
        super().__init__()
        name = type(self).__name__
        for argument, value in (("hidden", hidden), ("n_experts", n_experts)):
            if value < 1:
                raise ValueError(f"{name}: {argument}: want at least 1, got {value}")
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"{name}: top_k: want 1 to n_experts = {n_experts}, got {top_k}")
        self.n_experts, self.top_k, self.gated = n_experts, top_k, gated
        self.activation = activation_named(activation)
        self.fc1 = nn.Parameter(torch.empty(n_experts, 2 * hidden if gated else hidden, d_in))
        self.fc2 = nn.Parameter(torch.empty(n_experts, d_in, hidden))
        for weight in (self.fc1, self.fc2):
            bound = 1 / math.sqrt(weight.shape[2])  # as nn.Linear draws, expert by expert
            nn.init.uniform_(weight, -bound, bound)

    @abstractmethod
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts (..., top_k) int64 positions x (..., D) go to, and with what weights, in the compute dtype."""

    def mix(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """The weighted sum of the chosen: x (R, D), expert and weight (R, top_k) -> (R, D)."""
        run = self._everywhere if torch.compiler.is_compiling() or transformed() else self._where_chosen
        return run(x, expert, weight).to(x.dtype)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        x = linear(x, self.fc1[e])
        if not self.gated:
            return linear(self.activation(x), self.fc2[e])
        y, gate = x.chunk(2, -1)
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
