"""Interleaved timing: what slows the machine down for a while slows every contender down alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

LEAST, MOST = 3, 200  # rounds
SAMPLE = 1e-3  # seconds: calls shorter than this are timed several at once, CALLS at most
CALLS = 1000

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over `rounds` samples of `calls` calls each."""

    median: float
    low: float
    high: float
    rounds: int
    calls: int


def summarise(samples: list[float], calls: int) -> Timing:
    """Median and quartiles of seconds per call."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, calls)
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    assert math.isclose(middle, median(samples))
    return Timing(middle, low, high, len(samples), calls)


def once(run: Callable[[], Any], clock: Clock = time.perf_counter) -> tuple[Any, float]:
    """(what one call returned, seconds)."""
    start = clock()
    result = run()
    return result, clock() - start


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector off, and what lies about collected before."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def plan(each: Mapping[str, float], seconds: float) -> dict[str, tuple[int, int]]:
    """name -> (rounds, calls per sample), given seconds per call of each and a budget for all of them together.

    Everyone gets the same share of time; a slow contender gets fewer rounds, never less than three.
    """
    share = seconds / len(each)
    found = {}
    for name, cost in each.items():
        calls = min(math.ceil(SAMPLE / max(cost, SAMPLE / CALLS)), CALLS)
        found[name] = (min(max(int(share / max(calls * cost, 1e-9)), LEAST), MOST), calls)
    return found


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    seconds: float,
    *,
    finish: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time all `runs` in turn, round after round, each in at least three rounds. The first call, which compiles, is
    expected to have been made.

    Args:
        seconds: the budget for all together; three rounds of slow ones may exceed it.
        finish: called before the clock is read, to wait for work that was only started.
    """

    def sample(run: Callable[[], Any], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        finish()
        return (clock() - start) / calls

    with no_collection():
        # A second call apart: now compiled and with warm caches, it tells how long a call takes.
        plans = plan({name: sample(run, 1) for name, run in runs.items()}, seconds)
        most = max(rounds for rounds, _ in plans.values())
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(most):
            for name, run in runs.items():
                rounds, calls = plans[name]
                # Spread over the whole run: the slow ones sit out some of the rounds.
                if (turn + 1) * rounds // most > turn * rounds // most:
                    samples[name].append(sample(run, calls))
    return {name: summarise(values, plans[name][1]) for name, values in samples.items()}
