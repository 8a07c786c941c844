"""One row on many threads: its time is cut into stretches.

The kernels split rows and channels over threads, so one narrow row leaves most of a large machine idle. Here all
stretches are first run from a state of zero, side by side as rows of a batch; that and the decay over each stretch
gives the states that enter them, one after the other; then all stretches are run again from those. It is the same way
in which a sequence is split over devices, at twice the work: worth it from three idle threads a task on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _deterministic
from ._spec import Summary

# Positions of a stretch at least: below, the threads wait for each other more than they compute.
LEAST = 1024


def count(tasks: int, length: int) -> int:
    """Into how many stretches to cut `length` positions of work that can be split into `tasks` by itself; 1 for not."""
    threads = torch.get_num_threads()
    if threads < 3 * tasks or length < 2 * LEAST or _deterministic.active():
        return 1
    return min(threads // tasks, length // LEAST)


def run(
    parts: int,
    op: Callable[..., tuple[Tensor, Tensor]],
    summary: Callable[..., Summary],
    state: Tensor | None,
    **timed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """op(state=state, **timed) in `parts` stretches.

    Args:
        op: gives y (B, L, ...) and the last state (B, ...).
        summary: of a run from zero, `summary(**timed)`.
        timed: tensors (B, L, ...).
    """
    length = next(t.shape[1] for t in timed.values() if t is not None)
    whole = length // parts * parts

    def fold(t: Tensor | None) -> Any:
        return None if t is None else t[:, :whole].unflatten(1, (parts, whole // parts)).flatten(0, 1)

    def unfold(t: Tensor) -> Tensor:
        return t.unflatten(0, (-1, parts))

    folded = {name: fold(t) for name, t in timed.items()}
    over = summary(**folded)
    transition, made = unfold(over.transition), unfold(over.state)
    entering = [torch.zeros_like(made[:, 0]) if state is None else state.to(made.dtype)]
    for i in range(parts - 1):
        entering.append(transition[:, i] * entering[-1] + made[:, i])
    y, last = op(state=torch.stack(entering, 1).flatten(0, 1), **folded)
    y, last = unfold(y).flatten(1, 2), unfold(last)[:, -1]
    if whole < length:
        rest, last = op(state=last, **{name: None if t is None else t[:, whole:] for name, t in timed.items()})
        y = torch.cat([y, rest], 1)
    return y, last
