"""How wrong a result may be. Nobody types an absolute tolerance into a test: what is allowed follows from the dtype, or
from how wrong the plain definition is in that dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A result this many units of rounding (relative to the largest entry) away from the truth is never called wrong. Half
# precision is only stored, never computed in, so there one rounding is all that may be lost.
FLOOR, FLOOR_HALF = 4, 1
# Two float64 computations of one thing in different orders: the rounding they may pile up, per doubling of the length.
PILED = 4096


class LawError(AssertionError):
    """A law does not hold; the message says which, for which case, and by how much."""


def require(condition: bool, message: str) -> None:
    """Raise LawError unless `condition`. Unlike `assert`, it also works under `python -O`."""
    if not condition:
        raise LawError(message)


def eps(dtype: torch.dtype) -> float:
    """Unit of rounding; 0 for integers and booleans, which have to be exact."""
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def double(t: Tensor) -> Tensor:
    """The same numbers in float64 or complex128; other dtypes stay."""
    if t.is_complex():
        return t.to(torch.complex128)
    return t.to(torch.float64) if t.is_floating_point() else t


def scale(t: Tensor) -> float:
    """Largest magnitude, 0 for an empty tensor."""
    return double(t).abs().max().item() if t.numel() else 0.0


def error(got: Tensor, truth: Tensor, what: str) -> float:
    """Largest absolute difference. Raises LawError when shapes differ or `got` is not finite."""
    require(got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(truth.shape)}")
    if not got.numel():
        return 0.0
    got, truth = double(got.detach()), double(truth.detach())
    if got.is_floating_point() or got.is_complex():
        require(bool(torch.isfinite(truth).all()), f"{what}: the truth to compare with is not finite")
        bad = int((~torch.isfinite(got)).sum())
        require(bad == 0, f"{what}: {bad} of {got.numel()} entries are not finite")
        return (got - truth).abs().max().item()
    return float((got != truth).any())


def assert_no_worse(
    kernel: Tensor, plain: Tensor, truth: Tensor, factor: float, what: str, *, rounded: Tensor | None = None
) -> None:
    """`kernel` may be at most `factor` times as far from the float64 `truth` as honest rounding is.

    Args:
        plain: the plain definition computed in the dtype of `kernel`; its error is what honest rounding costs.
        rounded: the float64 truth for inputs that were each disturbed by one rounding of the dtype. In a tensor of few
            entries `plain` can be right by luck; how far `rounded` is from `truth` is honest then too.

    Never less than a few units of rounding, relative to the largest entry of the truth, are allowed.
    """
    require(kernel.dtype == plain.dtype, f"{what}: dtype {kernel.dtype}, want {plain.dtype}")
    wrong, honest = error(kernel, truth, what), error(plain, truth, f"{what} (plain definition)")
    if rounded is not None:
        honest = max(honest, error(rounded, truth, f"{what} (rounded inputs)"))
    units = FLOOR_HALF if kernel.dtype in (torch.float16, torch.bfloat16) else FLOOR
    floor = units * eps(kernel.dtype) * scale(truth)
    allowed = max(factor * honest, floor)
    require(
        wrong <= allowed,
        f"{what}: error {wrong:.3g} against float64, while honest rounding in {kernel.dtype} costs {honest:.3g}: "
        f"at most {factor:g} times that, or the floor {floor:.3g}, is allowed (largest entry {scale(truth):.3g})",
    )


def disturbed(t: Tensor, generator: torch.Generator) -> Tensor:
    """A float64 tensor, each entry off by a unit of float32 rounding, up or down at random; zeros and integers stay."""
    if not (t.is_floating_point() or t.is_complex()):
        return t
    sign = torch.randint(0, 2, t.shape, generator=generator).to(t.device) * 2 - 1
    return t * (1 + sign * torch.finfo(torch.float32).eps)


def assert_agree(got: Tensor, want: Tensor, what: str, length: int = 1, *, at_least: float = 0.0) -> None:
    """Two ways of computing one thing in one dtype differ only by rounding, which may grow with log(length).

    Rounding is relative to the largest entry, or to `at_least` if that is larger.
    """
    require(got.dtype == want.dtype, f"{what}: dtype {got.dtype}, want {want.dtype}")
    wrong, size = error(got, want, what), max(scale(want), at_least)
    allowed = PILED * eps(want.dtype) * (1 + math.log2(1 + length)) * size
    require(
        wrong <= allowed, f"{what}: differs by {wrong:.3g}, rounding explains {allowed:.3g} (relative to {size:.3g})"
    )


def assert_zero(t: Tensor, what: str) -> None:
    """Every entry is exactly zero (so it is finite too)."""
    bad = int((t != 0).sum())
    require(bad == 0, f"{what}: {bad} of {t.numel()} entries are not exactly zero")
