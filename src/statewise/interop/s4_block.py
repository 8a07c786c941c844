"""Weights of the `S4Block` of state-spaces/s4 (models/s4/s4.py, v4) for our S4 and S4D mixers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..mixers.siso import SISO
from ..ops.dplr.forms import System

_SHARED = ("kernel.C", "kernel.B", "kernel.inv_dt", "kernel.A_real", "kernel.A_imag", "D")
_LINEAR = ("output_linear.0.weight", "output_linear.0.bias")
_LOW_RANK = ("kernel.P", "kernel.l_kernel")


@torch.no_grad()
def load_s4_block(mixer: SISO, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of an `S4Block` (its `state_dict()`) into a mixer of the same sizes and transforms.

    Args:
        mixer: "s4", "s4d", or one of their bidirectional forms. S4D needs train_b=True if B is not all ones.
        weights: kernel.{C, B, inv_dt, A_real, A_imag}, D, output_linear.0.{weight, bias}, and for S4 kernel.P and
            kernel.l_kernel. Names may have a prefix "layer." as the block gives to all but the linear map.

    The block stores the half of the modes below the real axis, and S4 stores C (I - A_bar^L) for a length L that it
    remembers in l_kernel; here the half above is kept, and C itself, which is solved for in float64. A mode that does
    not decay within L tokens makes that ill-conditioned, as it makes the block's own step.

    Raises:
        KeyError: names that are missing or unknown.
        ValueError: a shape that is not what the mixer wants.
    """
    found = {name.removeprefix("layer."): t for name, t in weights.items()}
    low_rank = getattr(mixer, "P", None)
    wanted = {
        *_SHARED,
        *(_LINEAR if mixer.out_linear is not None else ()),
        *(_LOW_RANK if low_rank is not None else ()),
    }
    if found.keys() != wanted:
        missing, unknown = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
        raise KeyError(f"weights: missing {missing}, unknown {unknown} for {type(mixer).__name__}")
    _copy("kernel.inv_dt", mixer.log_dt, found["kernel.inv_dt"].squeeze(-1) if mixer.log_dt.ndim == 1 else None, found)
    for name in ("A_real", "A_imag"):
        _copy(f"kernel.{name}", getattr(mixer, name), None, found)
    _copy("kernel.B", mixer.B, _above(found["kernel.B"].squeeze(0)), found)
    C = _above(found["kernel.C"])
    _copy("kernel.C", mixer.C, C if mixer.directions > 1 else C.squeeze(0), found)
    _copy("D", mixer.D, found["D"].squeeze(0), found)
    if mixer.out_linear is not None:
        _copy(_LINEAR[0], mixer.out_linear.weight, None, found)
        _copy(_LINEAR[1], mixer.out_linear.bias, None, found)
    if isinstance(low_rank, Tensor):
        _copy("kernel.P", low_rank, _above(found["kernel.P"]), found)
        length = int(found["kernel.l_kernel"])
        if length < 0:
            raise ValueError(f"weights: kernel.l_kernel: want 0 or more, got {length}")
        if length:
            mixer.C.copy_(_restored(mixer, length))


def _copy(name: str, into: Tensor, value: Tensor | None, found: Mapping[str, Tensor]) -> None:
    value = found[name] if value is None else value
    if value.shape != into.shape:
        raise ValueError(f"weights: {name}: has shape {tuple(found[name].shape)}, the mixer wants {tuple(into.shape)}")
    into.copy_(value)


def _above(pairs: Tensor) -> Tensor:
    """The conjugate half, as pairs of reals."""
    return pairs * torch.tensor([1.0, -1.0], dtype=pairs.dtype, device=pairs.device)


def _restored(mixer: SISO, length: int) -> Tensor:
    """C from C (I - A_bar^length), as pairs of reals; at rate 1, for which the block's weights are."""
    rate, mixer.rate = mixer.rate, 1.0
    try:
        w, p, b, c, _ = (t.to(torch.complex128) if t.is_complex() else t for t in mixer.discrete())  # type: ignore[operator]
    finally:
        mixer.rate = rate
    return torch.view_as_real(System(w, p, b, c.reshape(-1, *w.shape)).restored(length)).reshape(mixer.C.shape)
