"""Initial values of state space parameters: step sizes, diagonal state matrices, input and output vectors.

Every random function draws from torch's global generator unless it is given one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._names import unknown
from .hippo import legs, legs_block_diagonal, legs_diagonal
from .ptd import Perturbed, perturb

DIAGONAL_INITS = ("lin", "inv", "inv2", "quad", "legs", "real", "rand", "diag", "ptd")
BLOCK_INITS = ("legs", "ptd")


def _check_dt_range(dt_min: float, dt_max: float) -> None:
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"dt_min, dt_max: want 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")


def log_uniform_log_dt(
    shape: tuple[int, ...] | int,
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """log dt, uniform on [log dt_min, log dt_max]. Returns a tensor of `shape`."""
    _check_dt_range(dt_min, dt_max)
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    u = torch.rand(size, device=device, dtype=dtype, generator=generator)
    return math.log(dt_min) + u * (math.log(dt_max) - math.log(dt_min))


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0; keeps its digits for small y."""
    return y + torch.log(-torch.expm1(-y))


def inverse_softplus_dt(
    shape: tuple[int, ...] | int,
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    floor: float = 1e-4,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A bias with softplus(bias) = dt, dt log-uniform on [dt_min, dt_max] and at least `floor`.

    Source: Mamba (2023), section 3.6 (initialisation of the bias of the step size).
    """
    log_dt = log_uniform_log_dt(shape, dt_min, dt_max, device, dtype, generator)
    return inverse_softplus(log_dt.exp().clamp(min=floor))


def _parse(init: str | Mapping[str, Any], known: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Name and options of an `init`: a name, or a mapping with the name under "name" and its options beside it."""
    options = {"name": init} if isinstance(init, str) else dict(init)
    name = options.pop("name", None)
    if name not in known:
        raise ValueError(unknown("init", str(name), known))
    for option in options:
        if name != "ptd" or option not in ("gamma", "seed"):
            raise ValueError(unknown(f"option of init {name!r}", option, ("gamma", "seed") if name == "ptd" else ()))
    return name, options


def block_init(init: str | Mapping[str, Any], d_state: int, blocks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Spectrum and change of basis of a diagonal state space of `blocks` equal parts, as S5 initialises it.

    Args:
        init: "legs" (normal part of HiPPO-LegS) or "ptd" (LegS perturbed and diagonalised, see `maths.ptd`), which may
            be a mapping {"name": "ptd", "gamma": 1000.0, "seed": 0}.
        d_state: P, counting both of each conjugate pair; 2 * blocks divides it.

    Returns:
        Lambda (P/2,), V (P, P/2) and its left inverse (P/2, P), complex128 on the CPU: 2 Re(V diag(Lambda) V_inv) is
        the block-diagonal real matrix, and a real input matrix B has the rows V_inv B in the modes.
    """
    name, options = _parse(init, BLOCK_INITS)
    if name == "legs":
        return legs_block_diagonal(d_state, blocks)
    if blocks < 1 or d_state % (2 * blocks):
        raise ValueError(f"blocks: want 2 * blocks to divide {d_state}, got {blocks}")
    part = perturb(d_state // blocks, **options)
    V, V_inv = (torch.block_diag(*[t] * blocks) for t in (part.V, part.V_inv))
    return part.Lambda.repeat(blocks), V, V_inv


def block_input(init: str | Mapping[str, Any], d_state: int, blocks: int = 1) -> Tensor:
    """HiPPO-LegS's own B in the modes of `block_init`: with it each block is the memory of one signal.

    Returns:
        (P/2,) complex128 on the CPU. For "legs" half of B, since that is what brings the normal part near to LegS.
    """
    _, _, V_inv = block_init(init, d_state, blocks)
    B = legs(d_state // blocks)[1].repeat(blocks)
    return V_inv @ (B if _parse(init, BLOCK_INITS)[0] == "ptd" else B / 2).to(V_inv.dtype)


def diagonal_init(
    init: str | Mapping[str, Any],
    copies: int,
    d_state: int,
    *,
    real_random: bool = False,
    b_clip: float | None = 2.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A and B of a diagonal state space with conjugate pairs, as S4D initialises them.

    With N = d_state and n = 0 ... N/2 - 1 (only the half with Im A >= 0 is stored):

    | init   | other names        | A_n                                                    | B_n |
    |--------|--------------------|--------------------------------------------------------|-----|
    | "lin"  | S4D-Lin, diag-lin  | -1/2 + i pi n                                          | 1   |
    | "inv"  | S4D-Inv, diag-inv  | -1/2 + i N/pi (N / (2n + 1) - 1)                       | 1   |
    | "inv2" |                    | -1/2 + i N/pi (N / (n + 1) - 1)                        | 1   |
    | "quad" |                    | -1/2 + i (1 + 2n)^2 / pi                               | 1   |
    | "legs" | S4D-LegS           | eigenvalues of the normal part of HiPPO-LegS           | V* B of HiPPO-LegS |
    | "ptd"  | S4-PTD             | eigenvalues of HiPPO-LegS, perturbed (see `maths.ptd`) | V^-1 B of HiPPO-LegS |
    | "real" | S4D-Real           | -(n + 1)                                               | 1   |
    | "rand" |                    | -1/2 + i exp(normal)                                   | 1   |
    | "diag" |                    | first half of the copies "inv", second half "lin"      | 1   |

    Args:
        init: one of these names; for "ptd" also a mapping {"name": "ptd", "gamma": 1000.0, "seed": 0}.
        copies: number of independent systems; even for "diag".
        d_state: N, counting both of each conjugate pair; even.
        real_random: draw the real part uniformly from (-1, 0) instead.
        b_clip: bound on |Im B|, which matters for "legs" only; None for no bound. The phase of the eigenvectors, on
            which it acts, is fixed in `hippo.legs_diagonal`.

    Returns:
        A, B (copies, N/2) complex128 on the CPU.

    Source: S4D (Gu et al., 2022), section 4.
    """
    init, options = _parse(init, DIAGONAL_INITS)
    if d_state < 2 or d_state % 2:
        raise ValueError(f"d_state: want an even number >= 2 (it counts conjugate pairs), got {d_state}")
    if copies < 1:
        raise ValueError(f"copies: want at least one system, got {copies}")
    if init == "diag":
        if copies % 2:
            raise ValueError(f"copies: init='diag' is half 'inv', half 'lin', so it wants an even number, got {copies}")
        pairs = [
            diagonal_init(part, copies // 2, d_state, real_random=real_random, generator=generator)
            for part in ("inv", "lin")
        ]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])

    half, N = d_state // 2, d_state
    size = (copies, half)
    n = torch.arange(half, dtype=torch.float64, device="cpu")
    real, B = torch.full_like(n, -0.5), torch.ones(half, dtype=torch.complex128, device="cpu")
    if init == "lin":
        imag = math.pi * n
    elif init == "inv":
        imag = N / math.pi * (N / (2 * n + 1) - 1)
    elif init == "inv2":
        imag = N / math.pi * (N / (n + 1) - 1)
    elif init == "quad":
        imag = (1 + 2 * n) ** 2 / math.pi
    elif init == "real":
        real, imag = -(n + 1), torch.zeros_like(n)
    elif init == "rand":
        imag = torch.randn(size, dtype=torch.float64, device="cpu", generator=generator).exp()
    elif init == "ptd":
        found: Perturbed = perturb(N, **options)
        # The decompositions keep the half below the real axis; its conjugate is the half that is stored here.
        real, imag = found.Lambda.real, -found.Lambda.imag
        B = (found.V_inv @ legs(N)[1].to(torch.complex128)).conj().resolve_conj()
    else:
        Lambda, V = legs_diagonal(N)
        rotated = V.T @ legs(N)[1].to(torch.complex128)
        bound = math.inf if b_clip is None else b_clip
        imag, B = -Lambda.imag, torch.complex(rotated.real, rotated.imag.clamp(-bound, bound))
    if real_random:
        real = -torch.rand(size, dtype=torch.float64, device="cpu", generator=generator)
    return torch.complex(real.expand(size).contiguous(), imag.expand(size).contiguous()), B.expand(size).contiguous()


def complex_normal(
    shape: tuple[int, ...],
    variance: float = 1.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Complex normal numbers with E|z|^2 = variance, as real pairs (*shape, 2)."""
    pairs = torch.randn((*shape, 2), device=device, dtype=dtype, generator=generator)
    return pairs * math.sqrt(variance / 2)


# Standard deviation of a standard normal variable cut at two standard deviations.
_TRUNCATED_STD = 0.8796256610342398


def truncated_normal(
    shape: tuple[int, ...],
    variance: float,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normal numbers cut at two standard deviations and rescaled so that the variance is as asked ("LeCun normal")."""
    values = torch.empty(shape, device=device, dtype=dtype)
    torch.nn.init.trunc_normal_(values, 0.0, 1.0, -2.0, 2.0, generator=generator)
    return values * (math.sqrt(variance) / _TRUNCATED_STD)
