"""Random numbers inside compiled generators: one stream for each sample, a pure function of (seed, index).

So a sample is the same whichever worker draws it, in whatever order, and with any version of NumPy. The generator is
SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import numba
import numpy as np

# boundscheck stays off and the lock is let go: samples are drawn by several threads at once.
kernel = numba.njit(nogil=True, cache=True)

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _32, _11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32), np.uint64(11)


@kernel
def _mixed(z):
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return z ^ (z >> _31)


@kernel
def stream(seed, index):
    """State (1,) uint64 of the stream of one sample."""
    state = np.empty(1, np.uint64)
    state[0] = _mixed(_mixed(np.uint64(seed) + _STEP) + np.uint64(index) * _STEP)
    return state


@kernel
def _next(state):
    state[0] += _STEP
    return _mixed(state[0])


@kernel
def below(state, n):
    """An integer, uniform in 0 to n - 1, for n up to 2**31."""
    return np.int64(((_next(state) >> _32) * np.uint64(n)) >> _32)


@kernel
def uniform(state):
    """A float, uniform in [0, 1)."""
    return np.float64(_next(state) >> _11) * 2.0**-53
