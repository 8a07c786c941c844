"""Decorators for autograd functions under autocast, for whatever device there is."""

from __future__ import annotations

from functools import partial

import torch

from ..._missing import missing

__all__ = ["custom_bwd", "custom_fwd"]

__getattr__ = missing(__name__)

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

custom_fwd = partial(torch.amp.custom_fwd, device_type=_DEVICE)
custom_bwd = partial(torch.amp.custom_bwd, device_type=_DEVICE)
