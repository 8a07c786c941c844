"""Where the weights of a layer stand, and its numbers, as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

Norm = tuple[Tensor, float]  # weight (D,) and epsilon of an RMS norm


class MambaWeights(NamedTuple):
    """Of a layer of width D with D_in channels, N states, a convolution of width K and a step size of rank R."""

    in_proj: Tensor  # (2 D_in, D)
    in_bias: Tensor | None
    conv: Tensor  # (D_in, K)
    conv_bias: Tensor | None
    x_proj: Tensor  # (R + 2 N, D_in)
    dt_proj: Tensor  # (D_in, R)
    dt_bias: Tensor | None
    A_log: Tensor  # (D_in, N)
    D: Tensor | None
    out_proj: Tensor  # (D, D_in)
    out_bias: Tensor | None


class Mamba2Weights(NamedTuple):
    """Of a layer of width D with H heads of width P, G groups, N states and a convolution of width K."""

    in_proj: Tensor  # (2 H P + 2 G N + H, D)
    in_bias: Tensor | None
    conv: Tensor  # (H P + 2 G N, K)
    conv_bias: Tensor | None
    dt_bias: Tensor  # (H,)
    A_log: Tensor  # (H,)
    D: Tensor | None  # (H,) or (H, P)
    norm: Tensor  # (H P,)
    out_proj: Tensor  # (D, H P)
    out_bias: Tensor | None


class Heads(NamedTuple):
    """What a Mamba-2 layer says beyond its weights."""

    groups: int = 1  # G of B and C
    norm_groups: int = 1  # over which the gated norm takes its statistics, and its epsilon
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] | None = None  # to which the step size is clamped


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class Layer:
    """A layer whose weights have been looked up.

    It keeps addresses: whoever keeps a layer has to notice when a weight is no longer where it was.
    """

    def __init__(
        self, name: str, weights: MambaWeights | Mamba2Weights, sizes: Sequence[int], norm: Norm | None,
        state: tuple[int, ...], gated_eps: float = 0.0, limits: tuple[float, float] = (0.0, 0.0),
    ):  # fmt: skip
        channels, width = weights.conv.shape
        self.depth, self.size = weights.in_proj.shape[1], weights.in_proj.numel()
        self.shapes = (width - 1, channels), state
        # Layers of the same kind can follow each other in one call.
        self.kind = name, weights.in_proj.dtype, weights.conv.dtype, self.depth
        self.table = np.array([*map(_at, weights), *sizes, 0 if norm is None else _at(norm[0])], np.int64)
        self.numbers = np.array([0 if norm is None else norm[1], gated_eps, *limits], np.float32)
        self._stack: tuple[tuple[Layer, ...], np.ndarray, np.ndarray] | None = None

    def stacked(self, layers: Sequence[Layer]) -> tuple[np.ndarray, np.ndarray]:
        """Tables and numbers of layers, of which this is the first, as arrays. The last ones asked for are kept."""
        behind, kept = tuple(layers[1:]), self._stack
        if kept is None or len(kept[0]) != len(behind) or any(a is not b for a, b in zip(kept[0], behind)):
            tables, numbers = np.stack([l.table for l in layers]), np.stack([l.numbers for l in layers])
            kept = self._stack = behind, tables, numbers
        return kept[1:]


def mamba(w: MambaWeights, norm: Norm | None) -> Layer:
    (channels, N), depth = w.A_log.shape, w.in_proj.shape[1]
    return Layer("mamba", w, (depth, channels, N, w.dt_proj.shape[1], w.conv.shape[1]), norm, (channels, N))


def mamba2(w: Mamba2Weights, norm: Norm | None, shape: Heads) -> Layer:
    H = w.A_log.shape[0]
    depth, inner = w.out_proj.shape
    N = (w.conv.shape[0] - inner) // (2 * shape.groups)
    per_channel = int(w.D is not None and w.D.ndim > 1)
    limits = shape.dt_limit or (-np.inf, np.inf)
    sizes = depth, H, inner // H, N, shape.groups, w.conv.shape[1], shape.norm_groups, per_channel
    return Layer("mamba2", w, sizes, norm, (H, inner // H, N), shape.norm_eps, limits)
