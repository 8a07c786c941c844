"""Work over several cores, in blocks, with progress.

Workers are threads: what takes time here is compiled code, which holds no interpreter lock. So there is nothing to
start or to pickle, it works in a notebook and without a `__main__` guard, and Ctrl-C ends after the blocks under way.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
MOST = 16  # workers that are taken unasked


def number(workers: int) -> int:
    """The given number of workers; for 0, one for each core that this process may use, `MOST` at most.

    Raises:
        ValueError: below 0.
    """
    if workers < 0:
        raise ValueError(f"workers: want at least 1, or 0 for one on each core, got {workers}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers or min(cores, MOST)


def blocks(work: Callable[[int, int], T], first: int, count: int, size: int, workers: int) -> Iterator[T]:
    """`work(start, stop)` for each block of `size` indices from `first` on, in order."""
    starts, threads = iter(range(first, first + count, size)), number(workers)
    with ThreadPoolExecutor(threads, thread_name_prefix="statewise-data") as pool:
        # A few blocks ahead and no more: results that wait are not to fill the memory.
        def submit(n: int) -> list[Future[T]]:
            return [pool.submit(work, start, min(start + size, first + count)) for start in islice(starts, n)]

        under_way = deque(submit(4 * threads))
        try:
            while under_way:
                found = under_way.popleft().result()
                under_way.extend(submit(1))
                yield found
        finally:
            # Without this, leaving early would first wait for all that is still in the queue.
            pool.shutdown(wait=False, cancel_futures=True)


def full_only(profile: str) -> None:
    """For a set whose published files are its full profile.

    Raises:
        ValueError: another profile.
    """
    if profile != "full":
        raise ValueError(f"source: the published files are the full profile; want --profile full, got {profile}")
