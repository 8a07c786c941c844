"""One position of whole layers of Mamba or Mamba-2 in one call: what decoding spends its time with.

The layers are compositions of `linear`, `short_conv_step`, `selective_scan_step` or `ssd_step`, and norms. Done one by
one, the calls of a layer take several times as long as reading its weights. Here a layer is three or four kernels, and
kernels and layers follow each other without Python in between. There is nothing here that the composition does not
give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._eager import free, plain
from ..linear import DTYPES, ROWS
from .layer import Heads, Layer, Mamba2Weights, MambaWeights, Norm, mamba, mamba2

__all__ = ["Heads", "Layer", "Mamba2Weights", "MambaWeights", "mamba2_layer", "mamba_layer", "step"]

_PLAIN = Heads()


def _alike(group: Sequence[Tensor | None]) -> bool:
    first = group[0]
    assert first is not None
    return first.dtype in DTYPES and all(t is None or (t.dtype is first.dtype and t.is_contiguous()) for t in group)


def _fit(weights: Any, before: Norm | None, width: int, **shapes: tuple[int, ...]) -> None:
    """Kernels read memory by these shapes."""
    given = {**weights._asdict(), "the norm's weight": None if before is None else before[0]}
    for name, want in {**shapes, "the norm's weight": (width,)}.items():
        if given[name] is not None and tuple(given[name].shape) != want:
            raise ValueError(f"{type(weights).__name__}: {name}: want {want}, got {tuple(given[name].shape)}")


def mamba_layer(weights: MambaWeights, norm: Norm | None = None) -> Layer | None:
    """A Mamba layer for `step`: projection, convolution, selective scan, gate, projection.

    Args:
        weights: of the layer.
        norm: weight (D,) and epsilon of an RMS norm before the layer; then x is added to what the layer gives.

    Returns:
        What `step` takes, or None if there is no kernel for these weights: matrices have to be of one dtype and
        vectors (with the convolution and A_log) of one, float32 or bfloat16, all dense, on CPU.

    Source: Gu & Dao 2023, "Mamba" (arXiv 2312.00752), section 3.4.
    """
    w = weights
    (D, R), (channels, N), K = (w.in_proj.shape[1], w.dt_proj.shape[1]), w.A_log.shape, w.conv.shape[1]
    _fit(
        w, norm, D, in_proj=(2 * channels, D), in_bias=(2 * channels,), conv=(channels, K), conv_bias=(channels,),
        x_proj=(R + 2 * N, channels), dt_proj=(channels, R), dt_bias=(channels,), D=(channels,),
        out_proj=(D, channels), out_bias=(D,),
    )  # fmt: skip
    large = [w.in_proj, w.in_bias, w.x_proj, w.dt_proj, w.out_proj, w.out_bias, None if norm is None else norm[0]]
    small = [w.A_log, w.conv, w.conv_bias, w.dt_bias, w.D]
    if not (_alike(large) and _alike(small) and plain(*large, *small)):
        return None
    return mamba(w, norm)


def mamba2_layer(weights: Mamba2Weights, norm: Norm | None = None, heads: Heads = _PLAIN) -> Layer | None:
    """A Mamba-2 layer for `step`: projection, convolution, SSD, gate, RMS norm, projection.

    Arguments and result as in `mamba_layer`.

    Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 7.
    """
    w = weights
    (D, inner), H, channels = w.out_proj.shape, len(w.A_log), len(w.conv)
    if inner % H or channels <= inner or (channels - inner) % (2 * heads.groups) or H % heads.groups:
        raise ValueError(
            f"mamba2_layer: conv: want H P + 2 G N channels, where G divides H; got {channels} channels, H = {H}, "
            f"H P = {inner}, G = {heads.groups}"
        )
    if inner % heads.norm_groups:
        raise ValueError(f"mamba2_layer: norm_groups: want a divisor of {inner}, got {heads.norm_groups}")
    skip = (H,) if w.D is None or w.D.ndim == 1 else (H, inner // H)
    outputs = inner + channels + H
    _fit(
        w, norm, D, in_proj=(outputs, D), in_bias=(outputs,), conv_bias=(channels,), dt_bias=(H,), D=skip,
        norm=(inner,), out_bias=(D,),
    )  # fmt: skip
    large = [w.in_proj, w.in_bias, w.out_proj, w.out_bias, None if norm is None else norm[0]]
    small = [w.A_log, w.conv, w.conv_bias, w.dt_bias, w.D, w.norm]
    if not (_alike(large) and _alike(small) and plain(*large, *small)):
        return None
    return mamba2(w, norm, heads)


def step(
    layers: Sequence[Layer], x: Tensor, states: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
    """One position of layers that follow each other.

    Args:
        layers: from `mamba_layer` or `mamba2_layer`, at least one.
        x: (B, D).
        states: of each layer (conv, ssm): the last inputs of the convolution (B, K-1, channels), oldest first, and
            (B, D_in, N) of Mamba or (B, H, P, N) of Mamba-2.

    Returns:
        (y (B, D) in the dtype of x, the states after this position); or None if only the composition serves: layers of
        different kinds, widths or dtypes, more than sixteen rows, another device or dtype, states not in float32,
        gradients, tracing, another back-end asked for.

    Raises:
        ValueError: x or a state does not fit its layer, or there are not as many of one as of the other.
    """
    if not layers or len(layers) != len(states):
        raise ValueError(f"step: states: want one for each of at least one layer, got {len(states)} for {len(layers)}")
    flat = [t for state in states for t in state]
    if (
        not 0 < x.shape[0] <= ROWS
        or x.dtype not in DTYPES
        or any(t.dtype is not torch.float32 or not t.is_contiguous() for t in flat)
        or any(layer.kind != layers[0].kind for layer in layers)
        or not free(x, *flat)
    ):
        return None
    from .numba import run

    return run(layers, x.contiguous(), states)
