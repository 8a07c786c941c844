"""What the Numba kernels share: how they are compiled, how work is spread over threads, and the way from tensors to
memory.

Why not Numba's own `parallel=True`: its default threading layer aborts the process when two Python threads launch
kernels at once, and its pool does not survive a fork. Kernels here are `nogil` functions over a range of blocks, and
`run` splits the range, so they are safe from several threads, in forked workers, and under `torch.set_num_threads`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

from . import _deterministic
from ._memory import empty
from ._parallel_numba import find_team, launch

# "contract" lets LLVM fuse a*b+c, which only removes a rounding. Nothing else of fast-math is on by default:
# infinities and NaN must stay visible.
kernel = numba.njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy", boundscheck=False)
# For functions whose only reductions are sums over channels, where the order of summation is free.
reducing_kernel = numba.njit(
    nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy", boundscheck=False
)
# For functions that call kernels in turn (`_parallel_numba.fork`), so that Python is not asked in between.
driver = numba.njit(nogil=True, cache=True)

_pool: ThreadPoolExecutor | None = None
_pool_threads = 0

_team = find_team()


def _after_fork() -> None:
    # Threads do not survive a fork, and OpenMP does not know: the child makes a pool of its own when it needs one.
    global _pool, _pool_threads, _team
    _pool, _pool_threads, _team = None, 0, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _executor(threads: int) -> ThreadPoolExecutor:
    global _pool, _pool_threads
    if _pool is None or _pool_threads < threads:
        _pool, _pool_threads = ThreadPoolExecutor(threads, thread_name_prefix="statewise"), threads
    return _pool


# Into how many ranges work is cut inside `statewise.deterministic`, whatever the number of threads.
_SHARES = 8


# Set by tests: spread work over threads also where it is too little to be worth it.
split_small = False


def workers(blocks: int, inline: bool = False) -> int:
    """Into how many ranges `run` will cut this many blocks: one a thread, or one in all."""
    if inline and not split_small:
        return 1
    if _deterministic.active():
        return max(1, min(_SHARES, blocks))
    return max(1, min(torch.get_num_threads(), blocks))


def run(function, blocks: int, *args, inline: bool = False) -> None:
    """Call `function(start, stop, worker, *args)` over [0, blocks), split evenly over threads.

    `inline`: the work is so little (a few tenths of a millisecond) that waking another thread would cost more.

    The split depends only on `blocks` and the number of threads, so per-worker sums are reproducible.
    """
    count = workers(blocks, inline)
    if count == 1:
        function(0, blocks, 0, *args)
        return
    threads = min(torch.get_num_threads(), count)
    if threads > 1 and _team:
        # As many as PyTorch itself asks for, even if some find nothing to do: another number would end threads.
        launch(_team, function, blocks, count, torch.get_num_threads(), args)
        return
    left = iter(range(count))

    def work() -> None:
        for w in left:
            function(w * blocks // count, (w + 1) * blocks // count, w, *args)

    if threads == 1:
        work()
        return

    pool = _executor(threads - 1)
    tasks = [pool.submit(work) for _ in range(threads - 1)]
    work()
    for task in tasks:
        task.result()


def team(work: int, small: int) -> tuple[int, int]:
    """(team, threads) for a function that forks kernels itself: this thread alone if there is `small` work or less."""
    threads = torch.get_num_threads()
    return (0, 1) if threads == 1 or not _team or (work <= small and not split_small) else (_team, threads)


def array(t: torch.Tensor) -> np.ndarray:
    """The tensor's memory as an array.

    `Tensor.numpy` pins the storage to its size for good, but FSDP frees and refills the storage of parameters. Those
    go through DLPack, which costs a few microseconds more.
    """
    if t.requires_grad or isinstance(t, torch.nn.Parameter):
        return np.from_dlpack(t.detach())
    return t.numpy()


def f32(t: torch.Tensor | None) -> np.ndarray | None:
    """A C-contiguous float32 array over the tensor's memory where possible, else a copy."""
    if t is None:
        return None
    # Each call that would change nothing still costs a microsecond, and a decoding step makes dozens.
    if t.dtype is not torch.float32:
        t = t.to(torch.float32)
    return array(t if t.is_contiguous() else t.contiguous())


def words(t: torch.Tensor) -> np.ndarray:
    """The tensor's numbers as one flat array: float32, complex64, or uint16 for bfloat16, which the vectors of `_simd`
    understand; float16 as a float32 copy."""
    t = t.detach()
    t = t.to(torch.float32) if t.dtype is torch.float16 else t
    t = t if t.is_contiguous() else t.contiguous()
    return array(t.view(torch.uint16) if t.dtype is torch.bfloat16 else t).reshape(-1)


def pairs(t: torch.Tensor) -> np.ndarray:
    """Complex numbers, or real ones as such, as pairs of float32 in one flat array."""
    return words(torch.view_as_real(t.detach().to(torch.complex64).resolve_conj()))


def output(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor in the dtype in which a kernel can write: that of `like`, but float32 for float16."""
    return empty(*shape, dtype=torch.float32 if like.dtype is torch.float16 else like.dtype)


def rows(t: torch.Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """Memory of t (B, L, C) as one array (see `words`), and its strides over batch and time (0 for a shared axis).

    The last axis has to be dense; a tensor in which it is not is copied.
    """
    t = t.detach().resolve_conj()
    if t.dtype is torch.float16:
        t = t.to(torch.float32)
    elif t.dtype is torch.bfloat16:
        t = t.view(torch.uint16)
    if t.shape[2] > 1 and t.stride(2) != 1:
        t = t.contiguous()
    batch, time = (0 if n == 1 else s for n, s in zip(t.shape[:2], t.stride()))
    span = 0 if t.numel() == 0 else (t.shape[0] - 1) * batch + (t.shape[1] - 1) * time + t.shape[2]
    # DLPack for the reason given in `array`: a shared row may be a view of a parameter.
    return np.from_dlpack(t.as_strided((span,), (1,))), (batch, time)


def split(rows: int, width: int, limit: int) -> int:
    """Into how many blocks of at most `limit` to split each of `rows` rows of `width` channels.

    As few as give every thread the same share: a wide block reads memory in long runs.
    """
    count = max(1, -(-width // limit))
    if _deterministic.active():
        return count  # so that a channel has the same place in its block whatever the batch
    threads = torch.get_num_threads()
    while rows * count < 4 * threads and rows * count % threads and width // count > 64:
        count += 1
    return count
