"""Does what was written compute what the model computes? Random tokens through both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._graphs import flat, start_state, unflat

# (kind, tokens, state by name) -> logits, state by name. `forward` has no state.
Runner = Callable[[str, Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]

# Largest difference of logits or state, relative to the largest magnitude in the tensor.
LIMIT = 1e-4
# One token, less than a chunk, several chunks and a part.
_SHAPES = ((1, 1), (2, 7), (3, 75))
_STEPS = 4


class ExportError(RuntimeError):
    """What was written does not compute what the model computes."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|; infinite where shapes differ or a number is not finite."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        return float("inf")
    error = (got - want).abs().max() / want.abs().max().clamp(min=1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def compare(model: Any, run: Runner, kinds: Sequence[str], capacity: int | None) -> dict[str, float]:
    """The largest relative error of each graph, over logits and states."""
    with torch.no_grad():
        return {kind: max(_differences(model, run, kind, capacity)) for kind in kinds}


def _differences(model: Any, run: Runner, kind: str, capacity: int | None) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    found: list[float] = []
    for batch, length in _SHAPES:
        tokens = torch.randint(0, model.vocab_size, (batch, length), generator=generator)
        if kind == "forward":
            found.append(relative_error(run(kind, tokens, {})[0], model(tokens)))
            continue
        start = start_state(model, batch, capacity)
        if capacity is not None:
            tokens = tokens[:, : max(1, capacity // 2)]
        got, want = flat(start), unflat({k: v.clone() for k, v in flat(start).items()}, start)
        # Twice, so that a state that was given back enters again.
        parts = [tokens, tokens] if kind == "extend" else list(tokens.unbind(1)[:_STEPS])
        for part in parts:
            logits, got = run(kind, part, got)
            right, want = getattr(model, kind)(part, want)
            found.append(relative_error(logits, right))
            found += [_leaf(got[name], leaf) for name, leaf in flat(want).items()]
    return found


def _leaf(got: Tensor, want: Tensor) -> float:
    if want.is_floating_point():
        return relative_error(got, want)
    return 0.0 if torch.equal(got, want) else float("inf")


def demand(errors: dict[str, float], limit: float, what: str) -> None:
    """Raise ExportError if an error is above the limit."""
    wrong = [f"{kind}: {error:.1e}" for kind, error in errors.items() if not error <= limit]
    if wrong:
        raise ExportError(f"{what}: relative error above {limit:.0e} ({', '.join(wrong)}); nothing was written")
