"""SwiGLU."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from ...._adapt import gradients
from ...._missing import missing

__all__ = ["swiglu"]

__getattr__ = missing(__name__)


def swiglu(xy: Tensor) -> Tensor:
    """silu(x) * y of the halves x and y of the last axis."""
    x, y = xy.chunk(2, -1)
    return silu(x) * y


def _swiglu_fwd(xy: Tensor, out: Tensor | None = None) -> Tensor:
    return swiglu(xy) if out is None else out.copy_(swiglu(xy))


def _swiglu_bwd(
    xy: Tensor, dout: Tensor, dxy: Tensor | None = None, recompute_output: bool = False, out: Tensor | None = None
):
    """The gradient of xy, and the output if it is asked for."""
    (grad,), (y,) = gradients(swiglu, (xy,), (dout,))
    grad = grad if dxy is None or grad is None else dxy.copy_(grad)
    if not recompute_output:
        return grad
    return grad, y if out is None else out.copy_(y)
