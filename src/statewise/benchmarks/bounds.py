"""What this machine could do at best: memory bandwidth, exponentials and matrix products, measured now."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

# What a row may need, and how the rate is called in tables.
NAMES = {"bytes": "bandwidth", "exp": "exp", "float32": "fp32 products", "bfloat16": "bf16 products"}


def sync(device: str) -> None:
    """Wait for what was started on the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def best_time(work: Callable[[], Any], seconds: float = 0.4, clock: Callable[[], float] = time.perf_counter) -> float:
    """Shortest of as many calls as fit into `seconds`, at least three."""
    work()
    best, began, calls = float("inf"), clock(), 0
    while calls < 3 or clock() - began < seconds:
        start = clock()
        work()
        best = min(best, clock() - start)
        calls += 1
    return best


@dataclass(frozen=True)
class Bounds:
    """Rates per second: bytes of c = a + b, torch.exp, and operations of square matrix products (an add is one)."""

    bytes: float
    exp: float
    float32: float
    bfloat16: float

    def least(self, needs: Mapping[str, float]) -> tuple[str, float]:
        """(which need binds, seconds it takes at the measured rate) of work that needs so many of each."""
        seconds = {name: amount / getattr(self, name) for name, amount in needs.items()}
        by = max(seconds, key=seconds.__getitem__)
        return by, seconds[by]

    def rows(self) -> list[tuple[str, str]]:
        """For people: (what, rate)."""
        return [
            ("memory bandwidth (c = a + b, arrays larger than the caches)", f"{self.bytes / 1e9:,.1f} GB/s"),
            ("exponentials (torch.exp, float32, in cache)", f"{self.exp / 1e9:,.2f} G/s"),
            ("matrix product, float32", f"{self.float32 / 1e9:,.0f} GFLOP/s"),
            ("matrix product, bfloat16", f"{self.bfloat16 / 1e9:,.0f} GFLOP/s"),
        ]

    def record(self) -> dict[str, float]:
        return asdict(self)


def measure(device: str = "cpu", seconds: float = 0.4) -> Bounds:
    """Measure all four rates with the threads PyTorch uses, about `seconds` each."""
    on_cpu = device == "cpu"

    def rate(amount: float, work: Callable[[], Any]) -> float:
        def timed() -> None:
            work()
            sync(device)

        return amount / best_time(timed, seconds)

    with torch.no_grad():
        n = 2**24 if on_cpu else 2**28
        a, b, c = (torch.ones(n, device=device) for _ in range(3))
        stream = rate(12 * n, lambda: torch.add(a, b, out=c))
        small = torch.rand(2**17 if on_cpu else 2**24, device=device)
        out = torch.empty_like(small)
        exp = rate(small.numel(), lambda: torch.exp(small, out=out))

        def product(dtype: torch.dtype, size: int) -> float:
            x, y = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
            z = torch.empty_like(x)
            return rate(2 * size**3, lambda: torch.mm(x, y, out=z))

        size, products = 1024 if on_cpu else 8192, []
        for dtype in (torch.float32, torch.bfloat16):
            # Without instructions for bfloat16 a large product takes seconds, and has the rate of a small one.
            found = product(dtype, size // 8)
            products.append(found if 2 * size**3 / found > seconds else product(dtype, size))
    return Bounds(stream, exp, *products)
