"""What the Triton kernels share. Only kernel files import this, on the first call of a kernel: it imports Triton.

Launch parameters come from `config`, a table of a few reasoned choices, so that a first call tunes nothing. With the
environment variable STATEWISE_AUTOTUNE=1, `tuned` times the alternatives once for each size and keeps the best.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._backend import interpreted
from ._backend import triton_reason as reason

__all__ = [
    "LOG2E",
    "capability",
    "config",
    "exp",
    "interpreted",
    "join",
    "log1p_exp",
    "processors",
    "reason",
    "sigmoid",
    "silu_slope",
    "softplus",
    "stretches",
    "tuned",
]

Config = dict[str, int]
R = TypeVar("R")

LOG2E = tl.constexpr(math.log2(math.e))

# Read once, like the choice of back-end: what a program computes must not change under way.
_AUTOTUNE = os.environ.get("STATEWISE_AUTOTUNE", "0") not in ("", "0")
# More than this many alternatives of one kernel are never tried.
MOST = 8


# ---- functions of numbers, inside kernels ----------------------------------------------------------------------------


@triton.jit
def exp(x):
    """e**x by the hardware's 2**x."""
    return tl.exp2(x * LOG2E)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def log1p_exp(e):
    """log(1 + e) for 0 <= e <= 1, to the last digits also for small e: the hardware's logarithm has none near 1.

    log(1 + e) = 2 atanh(s) with s = e / (2 + e) <= 1/3; the polynomial is atanh(s) / s in s**2, to 2e-8.
    """
    s = e / (2.0 + e)
    w = s * s
    p = 0.13433775 * w + 0.14116979
    p = p * w + 0.20003836
    p = p * w + 0.33333319
    return 2.0 * s * (p * w + 1.0)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p_exp(tl.exp2(tl.abs(x) * -LOG2E))


@triton.jit
def silu_slope(x, open_):
    """Derivative of x * sigmoid(x), where open_ = sigmoid(x)."""
    return open_ * (1.0 + x * (1.0 - open_))


# ---- launch parameters -----------------------------------------------------------------------------------------------


@cache
def _properties(device: torch.device) -> tuple[tuple[int, int], int]:
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def capability(t: Tensor) -> tuple[int, int]:
    """Compute capability of the GPU that holds `t`; that of an H100 under the interpreter."""
    return _properties(t.device)[0] if t.is_cuda else (9, 0)


def processors(t: Tensor) -> int:
    """Number of multiprocessors of the GPU that holds `t`; a few under the interpreter, so that small inputs are split
    in time there as large ones are on a GPU."""
    return _properties(t.device)[1] if t.is_cuda else 2


def config(op: str, device_capability: tuple[int, int], D: int, N: int) -> Config:
    """Launch parameters of a kernel, by reasoning about registers and lanes; none of them changes what is computed.

    Args:
        op: "selective_scan", "selective_scan_backward", "selective_scan_step", "linear_scan", "linear_scan_backward",
            "diagonal_kernel" or "diagonal_kernel_backward".
        device_capability: (major, minor) of the GPU. No choice depends on it yet.
        D: channels that one program could take (those of a group).
        N: state width; 2 for complex and 1 for real numbers in a linear scan.

    Returns:
        num_warps and the block sizes that the kernel takes as keywords.
    """
    wide = triton.next_power_of_2(max(D, 1))
    n = triton.next_power_of_2(max(N, 1))
    if op in ("selective_scan", "selective_scan_backward"):
        # One warp and 16 states in each lane: a warp alone needs no barrier, each lane keeps the states of one channel,
        # so that y is summed inside a lane, and up to N = 128 no register is spilled on sm_90.
        return {"BLOCK_D": min(wide, 64, max(1, 512 // n)), "num_warps": 1}
    if op == "selective_scan_step":
        # Reading and writing states is all there is to do. Small programs, so that one row fills many processors.
        return {"BLOCK_D": min(wide, max(1, 512 // n)), "num_warps": 1}
    if op in ("linear_scan", "linear_scan_backward"):
        # One warp, one channel on each lane: the scan of a tile stays inside a lane.
        return {"BLOCK_D": min(wide, 32), "num_warps": 1}
    if op in ("diagonal_kernel", "diagonal_kernel_backward"):
        # As small as tl.dot allows in modes and rows: operands of four bytes fill registers. 1024 positions from 80
        # powers of each mode.
        return {"ROWS": 16, "WIDTH": 64, "MODES": 16, "num_warps": 4}
    raise ValueError(f"op: no launch parameters for {op!r}")


def stretches(t: Tensor, warps: int, chunks: int) -> int:
    """Chunks in each stretch of time, when `warps` warps walk over `chunks` chunks each.

    Cutting time into stretches costs a second pass over the inputs, so two or three stretches gain nothing. A
    multiprocessor has 4 schedulers, and each wants about 2 warps: time is cut where that leaves room for 4 or more.
    """
    count = min(8 * processors(t) // max(warps, 1), chunks)
    if count < 4:
        return chunks
    return -(-chunks // count)


_best: dict[Hashable, Any] = {}


def tuned(key: Hashable, candidates: Sequence[Config], run: Callable[[Config], R]) -> R:
    """`run(candidates[0])`, the shipped choice; under STATEWISE_AUTOTUNE=1 on a GPU run the fastest for this `key`.

    `run` must give the same result for every candidate, and leave its inputs as they are.
    """
    if not 0 < len(candidates) <= MOST:
        raise ValueError(f"candidates: want 1 to {MOST} of them, got {len(candidates)}")
    if not _AUTOTUNE or interpreted() or len(candidates) == 1 or torch.cuda.is_current_stream_capturing():
        return run(candidates[0])
    if key not in _best:
        times = [triton.testing.do_bench(lambda c=c: run(c)) for c in candidates]
        _best[key] = candidates[times.index(min(times))]
    return run(_best[key])


# ---- stretches of one recurrence, joined -----------------------------------------------------------------------------


@triton.jit
def _join(
    transition, local, start, into, count, width,
    HAS_START: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    parts: tl.constexpr = 2 if COMPLEX else 1
    at = i * parts
    size = width.to(tl.int64) * parts
    s_re = tl.zeros([BLOCK], tl.float32)
    s_im = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        s_re = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
        if COMPLEX:
            s_im = tl.load(start + at + 1, mask=inside, other=0.0).to(tl.float32)
    if REVERSE:
        at += (count - 1) * size
    for _ in range(count):
        tl.store(into + at, s_re, mask=inside)
        d_re = tl.load(transition + at, mask=inside, other=0.0)
        l_re = tl.load(local + at, mask=inside, other=0.0)
        if COMPLEX:
            tl.store(into + at + 1, s_im, mask=inside)
            d_im = tl.load(transition + at + 1, mask=inside, other=0.0)
            l_im = tl.load(local + at + 1, mask=inside, other=0.0)
            gone = (d_re == 0) & (d_im == 0)
            new_re = d_re * s_re - d_im * s_im + l_re
            s_im = tl.where(gone, l_im, d_re * s_im + d_im * s_re + l_im)
            s_re = tl.where(gone, l_re, new_re)
        else:
            # What is not finite must not pass a document's start as 0 * NaN.
            s_re = tl.where(d_re == 0, l_re, d_re * s_re + l_re)
        if REVERSE:
            at -= size
        else:
            at += size


def join(transition: Tensor, local: Tensor, start: Tensor | None, *, reverse: bool = False) -> Tensor:
    """The state that enters each of S stretches: s_0 = start, s_{k+1} = transition_k s_k + local_k.

    Args:
        transition, local: (S, ...) float32 or complex64, dense: what a stretch does to a state, and adds to it.
        start: (...) dense, what enters the first stretch (the last in reverse); zeros if None.
        reverse: run from the last stretch to the first.
    """
    into = torch.empty_like(local)
    width = local[0].numel()
    block = 128

    def plain(t: Tensor | None) -> Tensor | None:
        return torch.view_as_real(t) if t is not None and t.is_complex() else t

    if width:
        _join[(triton.cdiv(width, block),)](
            plain(transition), plain(local), plain(start), plain(into), local.shape[0], width,
            HAS_START=start is not None, COMPLEX=local.is_complex(), REVERSE=reverse, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return into
