"""What the laws, the benchmark and `statewise doctor` need to know of an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from torch import Tensor


class Summary(NamedTuple):
    """A stretch of a linear recurrence as one element: state_out = transition * state_in + state.

    `transition` broadcasts against `state`; batch is axis 0 of both.
    """

    transition: Tensor
    state: Tensor


def combine(first: Summary, second: Summary) -> Summary:
    """The summary of `first` followed by `second` (associative)."""
    return Summary(second.transition * first.transition, second.transition * first.state + second.state)


@dataclass(frozen=True)
class OpSpec:
    """One op. All functions take the op's own argument names as keywords.

    Args:
        run: the public function, `run(**inputs, state=, seg=, backend=) -> (y, state)`.
        reference: the definition, same keywords but `backend`.
        step: `step(**inputs at one time, state=) -> (y_t, state)`, or None.
        value: the argument in which the op is linear.
        timed: the arguments with axes (B, L, ...); `step` takes them as (B, ...).
        reasons: `reasons(**inputs) -> {back-end: None or why not}`, in order of preference.
        cases: module with VARIANTS (names), FACTOR and `sample(variant, batch, length, dtype=, decay=, generator=)`,
            and MATRIX_VARIANTS if not all variants have a matrix.
        matrix: `matrix(**inputs without value, seg=) -> Tensor`, or None; `apply(matrix, value) -> y` multiplies by it.
        summary, carry: for ops that are linear recurrences, `summary(**inputs, seg=) -> Summary` and
            `carry(**inputs without value, state=, seg=) -> y_extra`.
        chunk: the chunk length around which edge cases are tried.
        tail: arguments that act on the output after the linear core (a gate); `matrix` leaves them out.
    """

    name: str
    run: Callable
    reference: Callable
    value: str
    timed: tuple[str, ...]
    reasons: Callable[..., dict[str, str | None]]
    cases: str
    step: Callable | None = None
    matrix: Callable | None = None
    apply: Callable | None = None
    summary: Callable | None = None
    carry: Callable | None = None
    chunk: int = 16
    tail: tuple[str, ...] = ()

    def load_cases(self) -> ModuleType:
        return import_module(self.cases)


OPS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    OPS[spec.name] = spec
    return spec
