"""Position-wise feed-forward parts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from ..mixers.layers import Linear


class GatedMLP(nn.Module):
    """fc2(y * silu(gate)) with [y, gate] = fc1(x): D -> 2 * hidden -> D (SwiGLU).

    The hidden width is rounded up to a multiple of `multiple_of`.

    Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202); wiring and rounding as in mamba_ssm.
    """

    def __init__(self, d_model: int, hidden: int, *, bias: bool = False, multiple_of: int = 128):
        super().__init__()
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = Linear(d_model, 2 * hidden, bias=bias)
        self.fc2 = Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(y * silu(gate))
