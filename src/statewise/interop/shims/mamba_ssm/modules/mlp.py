"""The gated MLP of mamba_ssm."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import silu

from ..._missing import missing

__all__ = ["GatedMLP"]

__getattr__ = missing(__name__)


class GatedMLP(nn.Module):
    """fc2(y * activation(gate)) with y and gate from fc1; the hidden width is rounded up to `multiple_of`."""

    def __init__(
        self, in_features: int, hidden_features: int | None = None, out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = silu, bias: bool = False, multiple_of: int = 128, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.activation = activation
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(y * self.activation(gate))
