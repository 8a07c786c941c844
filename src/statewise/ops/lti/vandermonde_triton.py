"""GPU kernels of the Vandermonde product: one program is a tile of positions of one channel.

With l = q Q + r the tile is a product of small matrices, (c a^(q Q)) times a^r, whose powers are made where they are
used: about one for twelve positions. Angles are counted in turns as integers of 64 bits, whose overflow is a whole
turn: so l times an angle has the same digits at every l, and no float64 is needed but to make the first integer.

The backward pass makes the powers again. Each program sums over a stretch of positions for a few modes; the partial
sums of the stretches are added in their order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, Config, capability, config, tuned
from .reference import NOTHING

_TURNS = tl.constexpr(1 / (2 * math.pi))
_RADIANS = tl.constexpr(2 * math.pi / 2**32)
_NOTHING = tl.constexpr(NOTHING)
# Stretches of the backward pass at most, so that partial sums stay small beside the kernel.
_STRETCHES = 16


@triton.jit
def _modes(log_a, n, inside, COMPLEX: tl.constexpr):
    """Of modes n: log2 of the modulus of a, and its angle in units of 2^-64 turns."""
    parts: tl.constexpr = 2 if COMPLEX else 1
    log_modulus = tl.maximum(tl.load(log_a + n * parts, mask=inside, other=0.0), _NOTHING) * LOG2E
    angle = tl.zeros_like(n).to(tl.int64)
    if COMPLEX:
        turns = tl.load(log_a + n * parts + 1, mask=inside, other=0.0).to(tl.float64) * _TURNS
        turns -= tl.floor(turns)
        # float64 has 53 bits.
        angle = (turns * 9007199254740992.0).to(tl.int64) << 11
    return log_modulus, angle


@triton.jit
def _power(log_modulus, angle, l, COMPLEX: tl.constexpr):
    """a^l. For real modes the imaginary part means nothing."""
    modulus = tl.exp2(log_modulus * l.to(tl.float32))
    re, im = modulus, modulus
    if COMPLEX:
        turned = ((angle * l.to(tl.int64)) >> 32).to(tl.float32) * _RADIANS
        re, im = modulus * tl.cos(turned), modulus * tl.sin(turned)
    return re, im


@triton.jit
def _forward(
    log_a, coeff, out, D, N, L, COMPLEX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MODES: tl.constexpr
):  # fmt: skip
    d = tl.program_id(0).to(tl.int64)
    row = tl.program_id(2).to(tl.int64) * D + d
    parts: tl.constexpr = 2 if COMPLEX else 1
    start = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)) * WIDTH
    r = tl.arange(0, WIDTH)
    short = tl.where(r < L, r, 0)  # a mode may grow, past the end to infinity
    log_a += d * N * parts
    coeff += row * N * parts
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, N, MODES):
        n = first + tl.arange(0, MODES)
        log_modulus, angle = _modes(log_a, n, n < N, COMPLEX)
        c_re = tl.load(coeff + n * parts, mask=n < N, other=0.0)[None, :]
        exponent = tl.where(start < L, start, 0)[:, None]
        p_re, p_im = _power(log_modulus[None, :], angle[None, :], exponent, COMPLEX)
        f_re, f_im = _power(log_modulus[:, None], angle[:, None], short[None, :], COMPLEX)
        if COMPLEX:
            c_im = tl.load(coeff + n * parts + 1, mask=n < N, other=0.0)[None, :]
            total = tl.dot(c_re * p_re - c_im * p_im, f_re, total, input_precision="ieee")
            total = tl.dot(-(c_re * p_im + c_im * p_re), f_im, total, input_precision="ieee")
        else:
            total = tl.dot(c_re * p_re, f_re, total, input_precision="ieee")
    l = start[:, None] + r[None, :]
    tl.store(out + row * L + l, total, mask=l < L)


@triton.jit
def _sums(slope, f_re, f_im, p_re, p_im, COMPLEX: tl.constexpr):
    """Sum over positions of slope a^l, for slope (rows, width), a^r (width, modes) and a^(q Q) (rows, modes)."""
    t_re = tl.dot(slope, f_re, input_precision="ieee")
    if COMPLEX:
        t_im = tl.dot(slope, f_im, input_precision="ieee")
        return tl.sum(p_re * t_re - p_im * t_im, 0), tl.sum(p_re * t_im + p_im * t_re, 0)
    else:  # noqa: RET505  (Triton compiles both branches unless the condition is a constant with an else)
        only = tl.sum(p_re * t_re, 0)
        return only, only


@triton.jit
def _backward(
    grad, log_a, coeff, d_log, d_coeff, K, D, N, L, TILES,
    COMPLEX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MODES: tl.constexpr,
):  # fmt: skip
    """d_log (stretches, D, N) and d_coeff (stretches, K, D, N): what the positions of a stretch of TILES tiles add."""
    d, stretch = tl.program_id(0).to(tl.int64), tl.program_id(2)
    parts: tl.constexpr = 2 if COMPLEX else 1
    n = tl.program_id(1) * MODES + tl.arange(0, MODES)
    inside = n < N
    r = tl.arange(0, WIDTH)
    short = tl.where(r < L, r, 0)  # a mode may grow, past the end to infinity
    log_modulus, angle = _modes(log_a + d * N * parts, n, inside, COMPLEX)
    f_re, f_im = _power(log_modulus[None, :], angle[None, :], short[:, None], COMPLEX)
    sum_re = tl.zeros([MODES], tl.float32)
    sum_im = tl.zeros([MODES], tl.float32)
    last = tl.minimum((stretch + 1) * TILES, tl.cdiv(L, ROWS * WIDTH))
    for k in range(K):
        row = k * D + d
        g_re = tl.zeros([MODES], tl.float32)
        g_im = tl.zeros([MODES], tl.float32)
        h_re = tl.zeros([MODES], tl.float32)
        h_im = tl.zeros([MODES], tl.float32)
        for tile in range(stretch * TILES, last):
            start = (tile * ROWS + tl.arange(0, ROWS)) * WIDTH
            l = start[:, None] + r[None, :]
            slope = tl.load(grad + row * L + l, mask=l < L, other=0.0)
            exponent = tl.where(start < L, start, 0)[:, None]
            p_re, p_im = _power(log_modulus[None, :], angle[None, :], exponent, COMPLEX)
            a_re, a_im = _sums(slope, f_re, f_im, p_re, p_im, COMPLEX)
            g_re += a_re
            g_im += a_im
            a_re, a_im = _sums(slope * l.to(tl.float32), f_re, f_im, p_re, p_im, COMPLEX)
            h_re += a_re
            h_im += a_im
        at = row * N + n
        to = d_coeff + (stretch * K * D * N + at) * parts
        c_re = tl.load(coeff + at * parts, mask=inside, other=0.0)
        tl.store(to, g_re, mask=inside)
        if COMPLEX:
            c_im = tl.load(coeff + at * parts + 1, mask=inside, other=0.0)
            tl.store(to + 1, -g_im, mask=inside)
            sum_re += c_re * h_re - c_im * h_im
            sum_im -= c_re * h_im + c_im * h_re
        else:
            sum_re += c_re * h_re
    to = d_log + (stretch * D + d) * N * parts + n * parts
    tl.store(to, sum_re, mask=inside)
    if COMPLEX:
        tl.store(to + 1, sum_im, mask=inside)


def _plain(t: Tensor) -> Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(t.resolve_conj().contiguous()) if t.is_complex() else t.contiguous()


def _alternatives(op: str, t: Tensor, D: int, N: int) -> list[Config]:
    shipped = config(op, capability(t), D, N)
    return [shipped, *(shipped | {"num_warps": w} for w in (2, 8))]


def forward(log_a: Tensor, coeff: Tensor, length: int) -> Tensor:
    """log_a (D, N), coeff (..., D, N): (..., D, length)."""
    (D, N), K, op = log_a.shape, math.prod(coeff.shape[:-2]), "diagonal_kernel"
    out = torch.empty(*coeff.shape[:-1], length, dtype=torch.float32, device=coeff.device)
    inputs = _plain(log_a), _plain(coeff)

    def launch(parameters: Config) -> Tensor:
        tiles = triton.cdiv(length, parameters["ROWS"] * parameters["WIDTH"])
        _forward[(D, tiles, K)](*inputs, out, D, N, length, COMPLEX=log_a.is_complex(), **parameters)
        return out

    return tuned((op, D, N, length), _alternatives(op, coeff, D, N), launch) if out.numel() else out


def backward(grad: Tensor, log_a: Tensor, coeff: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Gradients of log_a and coeff."""
    (D, N), K, op = log_a.shape, math.prod(coeff.shape[:-2]), "diagonal_kernel_backward"
    if not grad.numel() or not coeff.numel():
        return torch.zeros_like(log_a), torch.zeros_like(coeff)
    inputs = grad.contiguous(), _plain(log_a), _plain(coeff)

    def launch(parameters: Config) -> tuple[Tensor, Tensor]:
        tiles = triton.cdiv(length, parameters["ROWS"] * parameters["WIDTH"])
        each = triton.cdiv(tiles, _STRETCHES)
        stretches = triton.cdiv(tiles, each)
        d_log, d_coeff = log_a.new_empty(stretches, D, N), coeff.new_empty(stretches, *coeff.shape)
        _backward[(D, triton.cdiv(N, parameters["MODES"]), stretches)](
            *inputs, _plain(d_log), _plain(d_coeff), K, D, N, length, each, COMPLEX=log_a.is_complex(), **parameters
        )
        return d_log.sum(0), d_coeff.sum(0)

    return tuned((op, D, N, length), _alternatives(op, coeff, D, N), launch)
