"""Which implementation serves a call, and why.

Order: the `backend=` argument > `with use_backend(...)` > the environment variable STATEWISE_BACKEND > automatic.
An explicit choice that cannot serve raises and says why. Automatic takes the first implementation that can serve, in
the op's own order, with the plain PyTorch reference last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from .._tracing import transformed
from . import _deterministic

BACKENDS = ("triton", "numba", "reference")


class BackendError(RuntimeError):
    """An explicitly chosen back-end cannot serve the call."""


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: want one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# Read once: a changing environment must not change numerics in the middle of a program.
_environment: str | None = os.environ.get("STATEWISE_BACKEND") or None
if _environment is not None:
    _known(_environment, "environment variable STATEWISE_BACKEND")
_forced: str | None = None
# A look-up only: importing Triton takes long and is left to the first kernel.
_has_triton = find_spec("triton") is not None
# Triton itself looks at this when a kernel is defined; it then runs kernels in Python, on tensors of any device.
_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


_TRANSFORMED = "a transform of torch.func, or forward differentiation, is active: plain PyTorch alone goes through it"
_UNORDERED = "statewise.deterministic() is on, and the order of its additions depends on shapes"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op called inside the block runs on this back-end, or raises BackendError with the reason.

    The choice is one per process, not per thread.
    """
    global _forced
    previous, _forced = _forced, _known(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def chosen() -> str | None:
    """The back-end that a context or the environment asks for, None for an automatic choice."""
    return _forced or _environment


def resolve(op: str, reasons: Mapping[str, str | None], requested: str | None = None) -> str:
    """Name of the back-end that serves a call of `op`.

    Args:
        reasons: for each back-end of the op, in order of preference, None if it can serve this call and otherwise
            the reason why not.
        requested: the call's `backend=` argument.
    """
    if _deterministic.active():
        # Plain PyTorch, which `deterministic` puts in order operator by operator, where the op has no kernel for CPU.
        ordered = "numba" if "numba" in reasons else "reference"
        reasons = {name: reason or (None if name == ordered else _UNORDERED) for name, reason in reasons.items()}
    if transformed():
        reasons = {name: reason or (None if name == "reference" else _TRANSFORMED) for name, reason in reasons.items()}
    explicit = requested or chosen()
    if explicit is None:
        for name, reason in reasons.items():
            if reason is None:
                return name
        raise BackendError(f"{op}: no back-end can serve this call: {dict(reasons)}")
    _known(explicit, f"{op}: backend")
    reason = reasons.get(explicit, f"{op} has no {explicit} implementation (it has: {', '.join(reasons)})")
    if reason is not None:
        raise BackendError(f"{op}: backend {explicit!r} was asked for but cannot serve this call: {reason}")
    return explicit


def numba_reason(*tensors: torch.Tensor | None) -> str | None:
    """Why the Numba CPU kernels cannot serve these tensors, or None if they can."""
    for t in tensors:
        if t is None:
            continue
        if t.device.type != "cpu":
            return f"Numba kernels run on CPU tensors, got one on {t.device.type}"
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"Numba kernels compute in float32, got {t.dtype} (the reference keeps it)"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (environment variable TRITON_INTERPRET), also on CPU."""
    return _interpreted


def triton_reason(*tensors: torch.Tensor | None) -> str | None:
    """Why the Triton GPU kernels cannot serve these tensors, or None if they can."""
    for t in tensors:
        if t is None:
            continue
        device = t.device.type
        if device != "cuda" and not (device == "cpu" and _interpreted):
            return f"Triton kernels run on CUDA tensors, got one on {device}"
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"Triton kernels compute in float32, got {t.dtype} (the reference keeps it)"
    return None if _has_triton else "triton is not installed: pip install statewise[gpu]"
