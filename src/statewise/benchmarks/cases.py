"""What a row is: contenders that compute one thing from the same inputs, and when a result is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..testing.tolerance import LawError, assert_no_worse, disturbed, double, error, require, scale

OURS = "statewise"
# A peer further than this from the truth is marked. Half precision rounds by half of it already.
DOUBTFUL = 1e-2

Tensors = dict[str, Tensor]


class Missing(Exception):
    """A contender cannot take part; the message says why."""


@dataclass
class Contender:
    """One way of computing a row.

    Args:
        run: what is timed; called many times.
        result: from what the *first* call of `run` returned, the tensors to check, named and shaped as in the truth.
        probe: computes what is checked in a call of its own, where the timed call is too large for a float64 one.
        compiles: its first call builds something, so the time of that call says nothing.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Tensors] | None = None
    probe: Callable[[], Tensors] | None = None
    compiles: bool = False

    def checked(self, first: Any) -> Tensors | None:
        """What to compare with the truth, or None if nothing of it can be."""
        if self.probe is not None:
            return self.probe()
        return self.result(first) if self.result is not None else None


@dataclass
class Check:
    """The float64 truth, and the plain definition in the dtype of the contenders.

    Args:
        truth, plain: named tensors.
        rounded: the truth for inputs that were each disturbed by one rounding; what that costs is honest too.
        factor: how many times as wrong as `plain` our result may be; from the op's cases.
        cut: brings a contender's tensors to what the truth covers, for truths that look at windows of a long row.
    """

    truth: Tensors
    plain: Tensors
    rounded: Tensors
    factor: float
    cut: Callable[[Tensors], Tensors] = field(default=lambda got: got)

    def ours(self, got: Tensors, what: str) -> None:
        """Raise LawError unless every tensor is as close to the truth as the tolerance rule asks."""
        got = self.cut(got)
        require(got.keys() == self.truth.keys(), f"{what}: computed {sorted(got)}, want {sorted(self.truth)}")
        for name, truth in self.truth.items():
            assert_no_worse(
                got[name], self.plain[name], truth, self.factor, f"{what}: {name}", rounded=self.rounded[name]
            )

    def relative_error(self, got: Tensors) -> float:
        """Largest error of any tensor, relative to the largest entry of its truth; NaN where a tensor is not finite.

        A peer may lack a tensor (a state that it does not return).
        """
        worst = 0.0
        for name, t in self.cut(got).items():
            truth = self.truth[name]
            try:
                worst = max(worst, error(t, truth, name) / max(scale(truth), 1e-300))
            except LawError:
                return float("nan")
        return worst


@dataclass
class Case:
    """One row. Nothing is computed before the functions are called.

    Args:
        suite, what, mode, dtype, shape, length, batch: what tells it from other rows.
        ours: builds our contender.
        peers: name -> builds the contender, or raises Missing.
        check: computes the truth, or None where nothing but time or memory is compared.
        needs: gives amounts of what `bounds.Bounds` has rates of, for the shortest time that the machine allows.
        memory: name -> bytes that a peer is known to need at least.
        tokens: per call; 0 where tokens per second say nothing.
        smaller: the same row at another length, to find out what a peer will cost; or None.
        unit: "s" for time, "bytes" for memory.
        repeat: calls per contender of a row that is not timed here but tells its own figures (`run` returns it).
    """

    suite: str
    what: str
    mode: str
    dtype: str
    shape: str
    length: int
    ours: Callable[[], Contender]
    peers: Mapping[str, Callable[[], Contender]]
    check: Callable[[], Check] | None = None
    needs: Callable[[], Mapping[str, float]] | None = None
    memory: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    batch: int = 1
    smaller: Callable[[int], Case] | None = None
    unit: str = "s"
    repeat: int = 0

    @property
    def key(self) -> str:
        """Unique in a run, and what `--only` is matched against."""
        return f"{self.suite}/{self.what}/{self.mode}/{self.dtype}/B{self.batch}/L{self.length}"

    @property
    def family(self) -> tuple[str, ...]:
        """Rows that differ in length only."""
        return (self.suite, self.what, self.mode, self.dtype, str(self.batch))


def exact(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {k: double(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def nearly(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """In float64, each number off by one rounding of float32."""
    generator = torch.Generator().manual_seed(2)
    return {k: disturbed(double(v), generator) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def moved(inputs: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The same on another device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def gradients(y: Tensor, leaves: Mapping[str, Tensor], dy: Tensor) -> Tensors:
    """{"grad NAME": gradient of sum(y dy)} for the leaves that have one."""
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
    return {f"grad {name}": g for name, g in zip(leaves, grads) if g is not None}
