"""Perturb, then diagonalise: a diagonal system close to HiPPO-LegS in its whole transfer function.

LegS cannot be diagonalised in floating point: the condition of its eigenvectors grows exponentially with the size. S4D
and S5 diagonalise its normal part instead, which is right for each smooth input as the size grows, but puts a spike
into the transfer function. Here a small matrix E is sought for which A + E has well-conditioned eigenvectors, and then
A + E = V Lambda V^-1 is the exact decomposition of a nearby system.

E minimises log cond(V) + gamma |E| / |A| (spectral norms, columns of V of length one), with two walls: no eigenvalue
comes closer to the imaginary axis than `MARGIN` or to the real one than `GAP`. So all eigenvalues of a result are
conjugate pairs, N / 2 modes say everything, and the size of the parameters does not depend on luck. Large gamma means
closer to HiPPO and worse conditioned; cond(V) is about 0.15 |A| / |E|.

All is computed with NumPy in float64. Results depend on the seed only, up to the rounding of the machine; they are kept
on disk (see `folder`), because they take time: about 0.3 s for n = 16, 0.7 s for 32, 3 s for 64, 15 s for 128.

Source: Yu, Nigmetov, Morozov, Mahoney, Erichson 2023, "Robustifying State-space Models for Long Sequences via
Approximate Diagonalization" (arXiv 2310.01698), sections 3 and 4. The start, the walls and the schedule are our own.
"""

from __future__ import annotations

import math
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._files import write_atomically
from . import hippo

# The walls: all Re lambda < -MARGIN and |Im lambda| > GAP, each softly, with this slope inside.
MARGIN, GAP, SLOPE = 0.5, 0.5, 1.0
STEPS = 800
# Part of the name of what is on disk: a change of the recipe is another name.
_RECIPE = 1


class Modes(NamedTuple):
    """Half of the eigen-decomposition of a real matrix M: one of each conjugate pair, and each real mode.

    M = sum over modes of weight * Re(Lambda V V_inv), where V is a column and V_inv a row.
    """

    Lambda: Tensor  # (K,) complex128, Im <= 0, ascending in Im
    V: Tensor  # (N, K), columns of length one with a real first entry >= 0
    V_inv: Tensor  # (K, N), rows of the inverse of all eigenvectors (not the conjugate of V: V is not unitary)
    weight: Tensor  # (K,) float64: 2 for a conjugate pair, 1 for a real mode


def modes(matrix: Tensor) -> Modes:
    """Diagonalise a real matrix (N, N), in float64.

    A sum over modes with weights 2 and 1 is the same as 2 Re(...) over modes of which the real ones are halved.

    Raises:
        ValueError: not a square matrix, or no basis of eigenvectors in float64.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix: want (N, N), got {tuple(matrix.shape)}")
    M = matrix.detach().cpu().double().numpy()
    Lambda, V = _eigen(M)
    inverse = np.linalg.inv(V)
    lost = np.linalg.norm((V * Lambda) @ inverse - M)
    if not lost <= 1e-6 * np.linalg.norm(M):
        raise ValueError(f"matrix: its eigenvectors have condition {np.linalg.cond(V):.1e}, too large for float64")
    kept = np.flatnonzero(Lambda.imag <= 0)
    kept = kept[np.lexsort((Lambda.real[kept], Lambda.imag[kept]))]
    weight = np.where(Lambda.imag[kept] < 0, 2.0, 1.0)
    return Modes(
        *(torch.from_numpy(np.ascontiguousarray(t)) for t in (Lambda[kept], V[:, kept], inverse[kept], weight))
    )


def _eigen(M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All eigenvalues and eigenvectors, complex; the phase of an eigenvector fixed by its first entry."""
    Lambda, V = np.linalg.eig(M)
    Lambda, V = Lambda.astype(complex), V.astype(complex)
    first = np.where(V[0] == 0, 1.0, V[0])
    return Lambda, V * (np.abs(first) / first)


class Perturbed(NamedTuple):
    """LegS + E = 2 Re(V diag(Lambda) V_inv), all modes being conjugate pairs."""

    Lambda: Tensor  # (n/2,) complex128, Re < 0, Im < 0, ascending in Im
    V: Tensor  # (n, n/2)
    V_inv: Tensor  # (n/2, n)
    E: Tensor  # (n, n) float64

    @property
    def relative(self) -> float:
        """|E| / |A| in the spectral norm."""
        return float(torch.linalg.matrix_norm(self.E, 2) / torch.linalg.matrix_norm(hippo.legs(len(self.E))[0], 2))

    @property
    def condition(self) -> float:
        """Condition number of all eigenvectors, each of length one."""
        return float(torch.linalg.cond(torch.cat([self.V, self.V.conj()], 1)))


def perturb(n: int, gamma: float = 1000.0, seed: int = 0) -> Perturbed:
    """The perturbed and diagonalised HiPPO-LegS of size n: from memory, from disk, or computed and kept on disk.

    Args:
        n: state size, even.
        gamma: price of the perturbation, from 1 to 1e6: |E| / |A| becomes about 1 / gamma.
        seed: of the small random part of the start.

    Raises:
        ValueError: arguments out of range.
        RuntimeError: some eigenvalue ends up with a real part >= 0.
    """
    if n < 2 or n % 2:
        raise ValueError(f"n: eigenvalues come in conjugate pairs only for an even state size, got {n}")
    if not 1 <= gamma <= 1e6:
        raise ValueError(f"gamma: want a number from 1 to 1e6, got {gamma}")
    if seed < 0:
        raise ValueError(f"seed: want a number >= 0, got {seed}")
    return Perturbed(*(part.clone() for part in _perturbed(n, float(gamma), seed)))


@lru_cache(maxsize=64)
def _perturbed(n: int, gamma: float, seed: int) -> Perturbed:
    path = folder() / f"legs-{n}-{gamma!r}-{seed}-v{_RECIPE}.safetensors"
    found = _read(path, n) if path.is_file() else None
    if found is None:
        found = _diagonalise(n, _search(n, gamma, seed), f"n={n}, gamma={gamma:g}, seed={seed}")
        _write(path, found)
    return found


def _diagonalise(n: int, E: np.ndarray, what: str) -> Perturbed:
    A, _ = hippo.legs(n)
    Lambda, V, V_inv, weight = modes(A + torch.from_numpy(E))
    if not bool((weight == 2).all()):
        raise RuntimeError(f"ptd: {what}: {int((weight == 1).sum())} real eigenvalues are left; another seed may do")
    if not bool((Lambda.real < 0).all()):
        worst = float(Lambda.real.max())
        raise RuntimeError(f"ptd: {what}: an eigenvalue has real part {worst:.3g}, want < 0; a larger gamma may do")
    return Perturbed(Lambda, V, V_inv, torch.from_numpy(E))


# ---- the search ----------------------------------------------------------------------------------------------------


def _search(n: int, gamma: float, seed: int) -> np.ndarray:
    """E by Adam with steps that fall to zero along a cosine; never across the real axis."""
    A = hippo.legs(n)[0].numpy()
    size = np.linalg.norm(A, 2)
    E = _start(A, size * min(3e-2, 10 / gamma), seed)
    rate = min(2e-3, 1 / gamma) * size / n
    mean, square = np.zeros_like(E), np.zeros_like(E)
    for step in range(1, STEPS + 1):
        slope = _slope(A, E, gamma / size)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope * slope
        move = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        move *= rate * (1 + math.cos(math.pi * step / STEPS)) / 2
        # Where a pair meets on the real axis it could part along it and never come back.
        while not _only_pairs(A + E - move):
            move /= 2
        E = E - move
    return E


def _start(A: np.ndarray, size: float, seed: int) -> np.ndarray:
    """A small multiple of P P^T, and a little noise: A + P P^T is normal, so this is the way to better conditions.

    Also A + s P P^T with 0 <= s <= 1 has all its eigenvalues left of -1/2 (its symmetric part is at most -I/2), and
    soon only pairs. A start that is noise alone has real eigenvalues, and for large n unstable ones.
    """
    n = len(A)
    P = np.sqrt(np.arange(n) + 0.5)
    noise = np.random.default_rng(seed).standard_normal((n, n))
    towards, noise = size * np.outer(P, P) / (P @ P), 0.01 * size * noise / np.linalg.norm(noise, 2)
    while not _only_pairs(A + towards + noise):
        towards = 1.25 * towards
    return towards + noise


def _only_pairs(M: np.ndarray) -> bool:
    return bool((np.linalg.eigvals(M).imag != 0).all())


def _slope(A: np.ndarray, E: np.ndarray, price: float) -> np.ndarray:
    """Gradient in E of log cond(V) + price |E| + the walls."""
    Lambda, V = np.linalg.eig(A + E)
    left, size, right = np.linalg.svd(V)
    # d log cond(V) = Re <G, dV>. Columns of V keep their length, so what points along them has no effect.
    G = np.outer(left[:, 0], right[0]) / size[0] - np.outer(left[:, -1], right[-1]) / size[-1]
    G = G - V * (V.conj() * G).sum(0)
    # With X = V^-1 dE V: d lambda_k = X_kk, and dV = V (F * X) with F_jk = 1 / (lambda_k - lambda_j) off the diagonal.
    gaps = Lambda - Lambda[:, None]
    np.fill_diagonal(gaps, np.inf)
    inner = V.conj().T @ G / gaps.conj()
    low, close = Lambda.real > -MARGIN, np.abs(Lambda.imag) < GAP
    inner += np.diag(SLOPE * (low - 1j * np.sign(Lambda.imag) * close))
    of_V = np.linalg.solve(V.conj().T, inner @ V.conj().T).real
    left, _, right = np.linalg.svd(E)
    return of_V + price * np.outer(left[:, 0], right[0])


# ---- on disk -------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where results are kept: $STATEWISE_PTD, else statewise/ptd in the user's cache. Safe to delete."""
    told = os.environ.get("STATEWISE_PTD")
    if told:
        return Path(told)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statewise" / "ptd"


def _write(path: Path, found: Perturbed) -> None:
    from safetensors.torch import save_file

    tensors = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in found._asdict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file({k: t.contiguous() for k, t in tensors.items()}, temporary))
    except OSError:
        # A home that cannot be written to costs time, at the next start. It is no reason to fail.
        pass


def _read(path: Path, n: int) -> Perturbed | None:
    """What is in a file, or None (with a warning) if it is no use."""
    from safetensors import SafetensorError

    try:
        return _load(path, n)
    except (OSError, SafetensorError, ValueError) as error:
        warnings.warn(f"{path}: {error}; it is computed anew", stacklevel=2)
        return None


def _load(path: Path, n: int) -> Perturbed:
    """A decomposition of LegS + E with pairs only; ValueError for anything else that safetensors can read."""
    from safetensors.torch import load_file

    shapes = {"Lambda": (n // 2, 2), "V": (n, n // 2, 2), "V_inv": (n // 2, n, 2), "E": (n, n)}
    tensors = load_file(path)
    if {name: tuple(t.shape) for name, t in tensors.items()} != shapes:
        raise ValueError(f"want tensors of shapes {shapes}")
    if any(t.dtype != torch.float64 for t in tensors.values()):
        raise ValueError("want float64")
    found = Perturbed(**{name: t if name == "E" else torch.view_as_complex(t) for name, t in tensors.items()})
    want = hippo.legs(n)[0] + found.E
    lost = (2 * (found.V * found.Lambda @ found.V_inv).real - want).norm()
    if not (lost <= 1e-8 * want.norm() and (found.Lambda.real < 0).all() and (found.Lambda.imag < 0).all()):
        raise ValueError("V Lambda V_inv is not LegS + E, or not stable")
    return found
