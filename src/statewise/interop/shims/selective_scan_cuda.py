"""The compiled extension of mamba_ssm: the selective scan without autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from ._adapt import gradients
from ._missing import missing
from .mamba_ssm.ops.selective_scan_interface import scan

__all__ = ["bwd", "fwd"]

__getattr__ = missing(__name__)


@torch.no_grad()
def fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> list[Tensor]:  # fmt: skip
    """[y before the gate, x, gated y if z is given]; arguments as in `selective_scan_fn`.

    x (B, D, 1, 2 N) stands for what the original keeps for its backward pass. Of it only the last state has a meaning
    here: x[:, :, -1, 1::2], as in the original.
    """
    y, state = scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    y = y.transpose(1, 2).contiguous()
    kept = torch.stack([torch.zeros_like(state), state], -1).flatten(-2)[:, :, None]
    return [y, kept] if z is None else [y, kept, y * silu(z.to(y.dtype))]


@torch.no_grad()
def bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, dout: Tensor, x: Tensor | None, out: Tensor | None, dz: Tensor | None,
    delta_softplus: bool, recompute_out_z: bool,
) -> list[Tensor | None]:  # fmt: skip
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], then dz if z is given, then the gated y if it is asked for.

    x and out, which the forward pass returned, are not needed.
    """

    def run(u, delta, A, B, C, D, delta_bias, z):
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[0].transpose(1, 2)

    found, (y,) = gradients(run, (u, delta, A, B, C, D, delta_bias, z), (dout,))
    *grads, grad_z = found
    if z is not None:
        grads.append(grad_z if dz is None or grad_z is None else dz.copy_(grad_z))
        if recompute_out_z:
            grads.append(y.contiguous())
    return grads
