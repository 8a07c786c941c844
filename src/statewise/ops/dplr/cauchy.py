"""The Cauchy product, and the kernel of a diagonal-plus-low-rank system by its generating function.

At the roots of unity exp(-2 i theta_f), theta_f = pi f / L, the bilinear rule puts the node z = 2 i tan(theta_f), and

    sum_l K_l exp(-2 i theta_f l) = exp(i theta_f) [k(c~ b) - cos k(c~ p) (1 + cos k(p* p))^-1 k(p* b)]
    k(v)_f = sum_n v_n / (2 i sin(theta_f) - cos(theta_f) w_n)      over both halves of each conjugate pair

with c~ = c (1 - A^L). Numerator and denominator are multiplied by the cosine, so that nothing is infinite where the
root of unity is -1. For a pair of conjugates, with a = |w| and x = Re w,

    v / (q - cos w) + conj(v) / (q - cos conj(w)) = (cos alpha + i sin beta) / (dr + i di)
    alpha = -2 Re(v conj(w)),  beta = 4 Re v,  dr = (a cos - 2 sin)(a cos + 2 sin),  di = -4 x sin cos

Source: S4 (Gu et al., 2021), section 3.2 and appendix C.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from .._backend import numba_reason, resolve, triton_reason
from .._register import recomputing_kernels
from .reference import inverse, project, spread


def nodes(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """sin and cos of pi f / length for f = 0 ... length // 2, float64; the last cosine is exactly zero if it should."""
    theta = torch.arange(length // 2 + 1, dtype=torch.float64, device=device) * (math.pi / max(length, 1))
    cos = torch.cos(theta)
    if length % 2 == 0:
        cos[-1] = 0
    return torch.sin(theta), cos


def reasons(v: Tensor, w: Tensor) -> dict[str, str | None]:
    """For each back-end, None if it serves these inputs and else why not. All of them compute in float64."""
    # Only where the tensors are matters: the kernels take float64, which others do not.
    single = [torch.empty(0, dtype=torch.float32, device=t.device) for t in (v, w)]
    return {"triton": triton_reason(*single), "numba": numba_reason(*single), "reference": None}


def cauchy(v: Tensor, w: Tensor, length: int, *, backend: str | None = None) -> Tensor:
    """sum_n v_n / (2 i sin(theta_f) - cos(theta_f) w_n), theta_f = pi f / length, over both halves of conjugate pairs.

    That is cos(theta_f) times the Cauchy product at the nodes 2 i tan(theta_f), which the bilinear rule gives to the
    roots of unity exp(-2 i theta_f); at -1, where the node is infinite, it is sum_n v_n / (2 i).

    Args:
        v: (..., D, N), complex.
        w: (D, N), complex, Re w < 0.
        length: L >= 1.
        backend: "triton", "numba", "reference", or None. All of them compute in float64, whatever the inputs are:
            the low-rank correction of S4 takes the difference of numbers that nearly agree.

    Returns:
        (..., D, L // 2 + 1), complex128. The kernels hold nothing of size D N L, forward or backward.

    Source: S4 (Gu et al., 2021), section 3.2.
    """
    sizes: dict[str, int] = {}
    _checks.shape("cauchy", "w", w, ("D", "N"), sizes)
    lead = tuple(v.shape[:-2])
    _checks.shape("cauchy", "v", v, (*lead, "D", "N"), sizes)
    if not (v.is_complex() and w.is_complex()):
        raise TypeError(f"cauchy: v, w: want complex tensors, got {v.dtype} and {w.dtype}")
    if length < 1:
        raise ValueError(f"cauchy: length: want 1 or more, got {length}")
    chosen = resolve("cauchy", reasons(v, w), backend)
    v, w = v.reshape(-1, *w.shape).to(torch.complex128), w.to(torch.complex128)
    alpha = -2 * (v.real * w.real + v.imag * w.imag)
    beta = 4 * v.real
    run = {"numba": _numba, "triton": _triton, "reference": definition}[chosen]
    real, imag = run(alpha, beta, w.abs(), w.real, length)
    return torch.complex(real, imag).reshape(*lead, *real.shape[1:])


def definition(alpha: Tensor, beta: Tensor, a: Tensor, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary part (M, D, F), from alpha, beta (M, D, N), a = |w| and x = Re w (D, N), as at the top of
    this file."""
    sin, cos = nodes(length, a.device)
    a, x = a.unsqueeze(-1), x.unsqueeze(-1)
    dr, di = (a * cos - 2 * sin) * (a * cos + 2 * sin), -4 * x * sin * cos
    scale = 1 / (dr * dr + di * di)
    e, g = dr * scale, di * scale  # (D, N, F)

    def over(weights: Tensor, t: Tensor) -> Tensor:
        return torch.einsum("mdn,dnf->mdf", weights, t)

    return cos * over(alpha, e) + sin * over(beta, g), sin * over(beta, e) - cos * over(alpha, g)


def _fake(alpha, beta, a, x, length):
    shape = (*alpha.shape[:2], length // 2 + 1)
    return alpha.new_empty(shape), alpha.new_empty(shape)


_numba, _triton = recomputing_kernels(
    "cauchy_{}",
    "Tensor alpha, Tensor beta, Tensor a, Tensor x, int length",
    2,
    "statewise.ops.dplr.{}",
    _fake,
    definition,
)


def damped(w: Tensor, p: Tensor, b: Tensor, r: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w', p', q', b' of the system whose step is r A, where A is that of w, p, b; its kernel is r^l K_l for the same c.

    With S = (1 + r) - (1 - r) M / 2, its M' is 2 ((1 + r) M / 2 - (1 - r)) S^-1 and its b' is 2 S^-1 b; by the Woodbury
    identity M' = diag(w') - sum_r p'_r q'_r again.
    """
    kappa = (1 - r) / 2
    g = 1 / ((1 + r) - kappa * w)
    gp = g * p
    T = inverse(torch.eye(len(p), dtype=w.real.dtype, device=w.device) + kappa * project(p, gp).permute(2, 1, 0))
    after = torch.einsum("drs,sdn->rdn", T.to(w.dtype), g * p.conj().resolve_conj())
    solved = g * b - kappa * spread(gp, torch.einsum("drs,sd->rd", T, project(p, g * b)))
    return 2 * ((1 + r) / 2 * w - (1 - r)) * g, gp, 4 * r * after, 2 * solved


def generating(
    w: Tensor, p: Tensor, b: Tensor, c_tilde: Tensor, length: int, backend: str | None = None, q: Tensor | None = None
) -> Tensor:
    """The kernel K_l, l < length, from c~ = c (1 - A^length): (K, D, length), float64.

    Args:
        w, b: (D, N) and p (R, D, N), complex, as in `ops.dplr_ssm`.
        c_tilde: (K, D, N), complex.
        q: (R, D, N), complex, in place of the conjugate of p: M = diag(w) - sum_r p_r q_r.
    """
    q = p.conj().resolve_conj() if q is None else q
    w, p, b, c_tilde, q = (t.to(torch.complex128) for t in (w, p, b, c_tilde, q))
    K, R = len(c_tilde), len(p)
    left, right = torch.cat([c_tilde, q]), torch.cat([b.unsqueeze(0), p])
    r = cauchy(left.unsqueeze(1) * right, w, length, backend=backend)  # (K + R, 1 + R, D, F)
    sin, cos = nodes(length, w.device)
    inner = cos * r[K:, 1:]
    if R == 1:
        weights = r[K:, 0] / (1 + inner[:, 0])
    else:
        eye = torch.eye(R, dtype=inner.dtype, device=inner.device)
        weights = torch.linalg.solve(eye + inner.permute(2, 3, 0, 1), r[K:, 0].permute(1, 2, 0)).permute(2, 0, 1)
    spectrum = torch.complex(cos, sin) * (r[:K, 0] - cos * torch.einsum("krdf,rdf->kdf", r[:K, 1:], weights))
    return torch.fft.irfft(spectrum, n=length)
