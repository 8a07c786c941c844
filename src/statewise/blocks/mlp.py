"""Position-wise feed-forward parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from .._names import unknown

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """The function of this name in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(unknown("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]


class GatedMLP(nn.Module):
    """fc2(y * activation(gate)) with [y, gate] = fc1(x): D -> 2 * hidden -> D (SwiGLU for "silu").

    The hidden width is rounded up to a multiple of `multiple_of`. gate_scale and out_scale are factors (of muP) on the
    gate before the activation, and on the output.

    Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202); wiring and rounding as in mamba_ssm.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        *,
        bias: bool = False,
        multiple_of: int = 128,
        activation: str = "silu",
        gate_scale: float = 1.0,
        out_scale: float = 1.0,
    ):
        super().__init__()
        if hidden < 1 or multiple_of < 1:
            raise ValueError(f"GatedMLP: hidden: want at least 1, and multiple_of too, got {hidden} and {multiple_of}")
        hidden = -(-hidden // multiple_of) * multiple_of
        self.activation = activation_named(activation)
        self.gate_scale, self.out_scale = gate_scale, out_scale
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, -1)
        y = self.fc2(y * self.activation(gate if self.gate_scale == 1 else gate * self.gate_scale))
        return y if self.out_scale == 1 else y * self.out_scale


class MLP(nn.Module):
    """fc2(activation(fc1(x))): D -> hidden -> D, without a gate.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.3; squared ReLU: So et al. 2021 (arXiv 2109.08668).
    """

    def __init__(self, d_model: int, hidden: int, *, bias: bool = False, activation: str = "relu_squared"):
        super().__init__()
        if hidden < 1:
            raise ValueError(f"MLP: hidden: want at least 1, got {hidden}")
        self.activation = activation_named(activation)
        self.fc1 = nn.Linear(d_model, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
