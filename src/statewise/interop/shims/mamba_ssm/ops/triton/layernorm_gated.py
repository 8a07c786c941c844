"""Norms with a gate, in groups of channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from ......ops._checks import compute_dtype
from ......ops.norm import gated_rms_norm, rms_norm
from ...._adapt import gradients
from ...._missing import missing

__all__ = ["LayerNorm", "RMSNorm", "layernorm_fn", "rms_norm_ref", "rmsnorm_fn"]

__getattr__ = missing(__name__)


def layernorm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None = None, eps: float = 1e-6,
    group_size: int | None = None, norm_before_gate: bool = True, is_rms_norm: bool = False,
) -> Tensor:  # fmt: skip
    """norm(x) * silu(z) if norm_before_gate, else norm(x * silu(z)); without z just norm(x).

    Args:
        x, z: (..., D). weight, bias: (D,).
        group_size: statistics are taken over groups of so many neighbouring channels; all D if None.
        is_rms_norm: divide by the root mean square, without subtracting the mean.
    """
    width = x.shape[-1]
    size = width if group_size is None else group_size
    if width % size:
        raise ValueError(f"layernorm_fn: group_size: want a divisor of the width {width}, got {group_size}")
    gated = z is not None and not norm_before_gate
    if is_rms_norm and bias is None and (z is None or gated):
        if z is None:
            return rms_norm(x, weight, eps, width // size)
        return gated_rms_norm(x, z, weight, eps, width // size)
    wide = x.to(compute_dtype(x))
    if gated:
        wide = wide * silu(z.to(wide.dtype))  # type: ignore[union-attr]
    if is_rms_norm:
        y = rms_norm(wide, weight, eps, width // size)
    else:
        y = layer_norm(wide.unflatten(-1, (-1, size)), (size,), eps=eps).flatten(-2) * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if z is not None and norm_before_gate:
        y = y * silu(z.to(y.dtype))
    return y.to(x.dtype)


def rmsnorm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None = None, eps: float = 1e-6,
    group_size: int | None = None, norm_before_gate: bool = True,
) -> Tensor:  # fmt: skip
    """`layernorm_fn` with is_rms_norm=True."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


def rms_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None = None, eps: float = 1e-6,
    group_size: int | None = None, norm_before_gate: bool = True, upcast: bool = True,
) -> Tensor:  # fmt: skip
    """The same on the plain PyTorch definition; it always computes in float32 at least."""
    from ......ops import use_backend

    with use_backend("reference"):
        return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)


def _layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, z: Tensor | None = None, out: Tensor | None = None,
    group_size: int | None = None, norm_before_gate: bool = True, is_rms_norm: bool = False,
) -> tuple[Tensor, None, None]:  # fmt: skip
    """(y, None, None): mean and reciprocal deviation are not kept, the backward pass computes them again."""
    with torch.no_grad():
        y = layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm)
    return (y if out is None else out.copy_(y)), None, None


def _layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, mean: Tensor | None, rstd: Tensor | None,
    z: Tensor | None = None, group_size: int | None = None, norm_before_gate: bool = True, is_rms_norm: bool = False,
    recompute_output: bool = False, dz: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dweight, dbias, dz), and the output if it is asked for. mean and rstd are not used."""

    def run(x, weight, bias, z):
        return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm)

    (dx, dweight, dbias, grad_z), (y,) = gradients(run, (x, weight, bias, z), (dy,))
    if dz is not None and grad_z is not None:
        grad_z = dz.copy_(grad_z)
    if not recompute_output:
        return dx, dweight, dbias, grad_z
    return dx, dweight, dbias, grad_z, y if out is None else out.copy_(y)


class LayerNorm(nn.Module):
    """`layernorm_fn` with weight and bias (D,)."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None, norm_before_gate: bool = True,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


class RMSNorm(nn.Module):
    """`rmsnorm_fn` with a weight (D,)."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None, norm_before_gate: bool = True,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
