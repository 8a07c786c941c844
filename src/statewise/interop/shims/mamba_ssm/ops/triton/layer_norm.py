"""Layer norm and root-mean-square norm with the residual sum before them, as the blocks of mamba_ssm use them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from ......ops._checks import compute_dtype
from ......ops.norm import rms_norm
from ...._missing import missing

__all__ = [
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]

__getattr__ = missing(__name__)


def layer_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, x1: Tensor | None = None,
    weight1: Tensor | None = None, bias1: Tensor | None = None, eps: float = 1e-6, dropout_p: float = 0.0,
    rowscale: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False, is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
):  # fmt: skip
    """The norm of s = dropout(rowscale * x) + dropout(x1) + residual, in the dtype of x.

    Args:
        x, x1, residual: (..., D). rowscale: (...). weight, bias: (D,).
        weight1, bias1: of a second norm of the same sum.
        prenorm: also return the sum s: in the dtype of `residual`; without one in float32 if residual_in_fp32, and
            else in the dtype of x.
        return_dropout_mask: also return which numbers of x and of x1 were kept (None without dropout or x1).
    """
    if x1 is not None and rowscale is not None:
        raise ValueError("layer_norm_fn: rowscale: want None where x1 is given")
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    total = x.to(torch.promote_types(compute_dtype(x), compute_dtype(torch.empty(0, dtype=kept))))
    if rowscale is not None:
        total = total * rowscale[..., None].to(total.dtype)
    total, mask = _dropout(total, dropout_p)
    mask1 = None
    if x1 is not None:
        second, mask1 = _dropout(x1.to(total.dtype), dropout_p)
        total = total + second
    if residual is not None:
        total = total + residual.to(total.dtype)

    def norm(weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_rms_norm:
            y = rms_norm(total, weight.to(total.dtype), eps)
            return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)
        bias = None if bias is None else bias.to(total.dtype)
        return layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias, eps).to(x.dtype)

    results: list[Tensor | None] = [norm(weight, bias)]
    if weight1 is not None:
        results.append(norm(weight1, bias1))
    if prenorm:
        results.append(total.to(kept))
    if return_dropout_mask:
        results += [mask, mask1]
    return results[0] if len(results) == 1 else tuple(results)


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    if p == 0.0:
        return x, None
    mask = torch.rand(x.shape, device=x.device) > p
    return x * mask / (1.0 - p), mask


def rms_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, x1: Tensor | None = None,
    weight1: Tensor | None = None, bias1: Tensor | None = None, eps: float = 1e-6, dropout_p: float = 0.0,
    rowscale: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
):  # fmt: skip
    """`layer_norm_fn` with is_rms_norm=True."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-6,
    prenorm: bool = False, upcast: bool = False,
):  # fmt: skip
    """`layer_norm_fn` of x + residual; it always computes in float32 at least."""
    return layer_norm_fn(x, weight, bias, residual, eps=eps, prenorm=prenorm)


def rms_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-6,
    prenorm: bool = False, upcast: bool = False,
):  # fmt: skip
    """`rms_norm_fn` of x + residual; it always computes in float32 at least."""
    return rms_norm_fn(x, weight, bias, residual, eps=eps, prenorm=prenorm)


def layer_norm_linear_fn(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, linear_weight: Tensor, linear_bias: Tensor | None,
    residual: Tensor | None = None, eps: float = 1e-6, prenorm: bool = False, residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
):  # fmt: skip
    """A linear map of `layer_norm_fn`; with prenorm also the sum."""
    found = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )  # fmt: skip
    if not prenorm:
        return linear(found, linear_weight, linear_bias)
    return linear(found[0], linear_weight, linear_bias), found[1]


def _layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None,
    x1: Tensor | None = None, weight1: Tensor | None = None, bias1: Tensor | None = None, dropout_p: float = 0.0,
    rowscale: Tensor | None = None, out_dtype: torch.dtype | None = None, residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False, return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(y, y1, None, None, sum, None, mask, mask1): without autograd, and without what only its backward needs."""
    in_fp32 = residual is None and residual_dtype == torch.float32
    with torch.no_grad():
        y, *y1, total, mask, mask1 = layer_norm_fn(
            x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, True, in_fp32, is_rms_norm, True
        )
    y, second = (t if t is None or out_dtype is None else t.to(out_dtype) for t in (y, y1[0] if y1 else None))
    masks = (mask, mask1) if return_dropout_mask else (None, None)
    return y, second, None, None, total, None, *masks


class RMSNorm(nn.Module):
    """`rms_norm_fn` with a weight (D,)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.eps, self.dropout_p = eps, dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False):
        return rms_norm_fn(
            x, self.weight, None, residual, eps=self.eps, dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm, residual_in_fp32=residual_in_fp32,
        )  # fmt: skip
