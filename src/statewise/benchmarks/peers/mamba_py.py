"""mambapy: a parallel scan in log L passes over tensors (B, L, D, N)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.functional import silu, softplus

from . import Run


def selective_scan(inputs: Mapping[str, Any], mode: str) -> Run:
    """What `MambaBlock` does between its convolution and its output projection."""
    from mambapy.mamba import MambaBlock

    x, dt, A, B, C, D, z, bias = (inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    # The method uses nothing of the module that it belongs to.
    return lambda: (MambaBlock.selective_scan(None, x, softplus(dt + bias), A, B, C, D) * silu(z), None)


def linear_scan(inputs: Mapping[str, Any], mode: str) -> Run:
    """`pscan` with one state per channel."""
    from mambapy.pscan import pscan

    def run():
        h = pscan(inputs["a"][..., None], inputs["x"][..., None])[..., 0]
        return h, h[:, -1]

    return run
