"""How far back outputs depend on inputs, by gradients, and how large the state gets. For every mixer and model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import state as states
from ..mixers.base import Causal
from ..segments import Segments

BATCH = 16  # positions whose gradients are taken in one pass


@dataclass(frozen=True)
class Memory:
    """Norms of the derivatives of outputs by inputs.

    Args:
        influence: (T, L): entry [i, s] is the norm of d y_t / d x_s for t = positions[i], averaged over rows.
        positions: (T,), the outputs that were asked.
        what: the mixer or model, for titles.
        causal: whether its type promises that no output sees the future.
        noise: what, relative to the largest entry, may be rounding. Fourier transforms leave it in the future too.
    """

    influence: Tensor
    positions: Tensor
    what: str
    causal: bool
    noise: float

    @property
    def lags(self) -> Tensor:
        """(K,): how many tokens back, ascending; below zero is the future, of which a causal model has none."""
        first = int(self.positions.max()) + 1
        last = self.influence.shape[1] - 1 - int(self.positions.min())
        return torch.arange(-last if self.looks_ahead else 0, first)

    @property
    def looks_ahead(self) -> bool:
        at = torch.arange(self.influence.shape[1])
        later = self.influence * (at > self.positions[:, None])
        return not self.causal and bool(later.max() > self.noise * self.influence.max())

    @property
    def curve(self) -> Tensor:
        """(K,): the mean norm for each of `lags`, over the outputs that reach so far."""
        at = torch.arange(self.influence.shape[1])
        lag = self.positions[:, None] - at  # (T, L)
        lags = self.lags
        index = (lag - lags[0]).flatten()
        kept = (index >= 0) & (index < len(lags))
        sums = torch.zeros(len(lags), dtype=self.influence.dtype)
        counts = torch.zeros_like(sums)
        sums.index_add_(0, index[kept], self.influence.flatten()[kept])
        counts.index_add_(0, index[kept], torch.ones_like(sums[:1]).expand(int(kept.sum())))
        return sums / counts.clamp(min=1)

    @property
    def half_life(self) -> int:
        """How many tokens, the present one included, hold half of the influence of the past."""
        return self.reach(0.5)

    def reach(self, share: float = 0.9) -> int:
        """How many tokens, the present one included, hold this share of all influence of the past."""
        if not 0 < share <= 1:
            raise ValueError(f"reach: share: want 0 < share <= 1, got {share}")
        past = self.curve[self.lags >= 0].double()
        part = past.cumsum(0) / past.sum().clamp(min=torch.finfo(past.dtype).tiny)
        return int((part < share * (1 - 1e-6)).sum()) + 1


def memory(
    model: nn.Module,
    x: Tensor,
    seg: Segments | None = None,
    *,
    positions: int = 64,
    probes: int | None = 4,
    seed: int = 0,
    what: str | None = None,
) -> Memory:
    """How much each input matters to later outputs, by automatic differentiation.

    Works for mixers, blocks and whole models. For tokens the derivative is by their embeddings.

    Args:
        model: anything that maps x to (B, L, ...).
        x: (B, L, D), or tokens (B, L).
        seg: documents and padding, for a model that takes them.
        positions: at how many outputs, at most L. Those of a causal model are spread over the later half of x, so that
            each can look far back; where a model may look ahead too, over all of x.
        probes: the norm of a derivative (a matrix) is estimated with so many random directions of the output, with
            an error of about 1 / sqrt(2 probes) for each entry; None: exact, by all of them.
        seed: of the directions.

    Raises:
        ValueError: the output does not have a position for each input; nothing to differentiate by.
    """
    if x.ndim < 2 or 0 in x.shape[:2]:
        raise ValueError(f"memory: x: want (B, L) or (B, L, D) with at least one token, got {tuple(x.shape)}")
    if positions < 1 or (probes is not None and probes < 1):
        raise ValueError(f"memory: positions, probes: want at least 1, got {positions} and {probes}")
    rows, length = x.shape[:2]
    first = length // 2 if length > 1 and isinstance(model, Causal) else 0
    at = torch.linspace(first, length - 1, min(positions, length - first)).round().long().unique()
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(len(at), length, dtype=torch.float64)
    for begin in range(0, len(at), BATCH):
        part = at[begin : begin + BATCH]
        squares[begin : begin + len(part)] = _squares(model, x, seg, part, probes, generator)
    noise = 4096 * torch.finfo(_dtype(model, x)).eps
    return Memory((squares / rows).sqrt(), at, what or type(model).__name__, isinstance(model, Causal), noise)


def _dtype(model: nn.Module, x: Tensor) -> torch.dtype:
    if x.is_floating_point():
        return x.dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _squares(
    model: nn.Module, x: Tensor, seg: Segments | None, at: Tensor, probes: int | None, generator: torch.Generator
) -> Tensor:
    """(T, L): squared Frobenius norms of d y_t / d x_s for t in `at`, summed over rows."""
    rows, length = x.shape[:2]
    copies = x.repeat(len(at), *(1,) * (x.ndim - 1))  # copy i answers for position at[i]
    with torch.enable_grad(), _leaf(model, copies) as leaf:
        y = model(leaf.given) if seg is None else model(leaf.given, _repeated(seg, len(at)))
        if not isinstance(y, Tensor) or y.ndim < 3 or y.shape[:2] != copies.shape[:2]:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"memory: model: want an output for each position, (B, L, ...), got {got}")
        index = at.repeat_interleave(rows).to(y.device)
        asked = y[torch.arange(len(y), device=y.device), index].flatten(1)  # (T B, outputs)
        source = leaf.source()
        width = asked.shape[1]
        if probes is None or probes >= width:
            directions = torch.eye(width, dtype=asked.dtype, device=asked.device)
            scale = 1.0
        else:
            directions = torch.randn(probes, width, generator=generator).to(asked)
            scale = 1 / probes
        total = torch.zeros(len(at), length, dtype=torch.float64)
        for i, direction in enumerate(directions):
            keep = i + 1 < len(directions)
            (g,) = torch.autograd.grad(asked @ direction, source, torch.ones_like(asked[:, 0]), retain_graph=keep)
            norms = g.double().square().flatten(2).sum(-1).cpu()  # (T B, L)
            total += scale * norms.unflatten(0, (len(at), rows)).sum(1)
    return total


def _repeated(seg: Segments, times: int) -> Segments:
    valid = None if seg.valid is None else seg.valid.repeat(times, 1)
    return Segments(seg.position.repeat(times, 1), valid)


class _Leaf:
    """What the model is called with, and the tensor that its outputs are differentiated by."""

    def __init__(self, given: Tensor) -> None:
        self.given = given
        self.embedded: Tensor | None = given if given.is_floating_point() else None

    def source(self) -> Tensor:
        if self.embedded is None:
            raise ValueError("memory: model: want an nn.Embedding of the tokens, to differentiate by; there is none")
        return self.embedded


@contextmanager
def _leaf(model: nn.Module, x: Tensor) -> Iterator[_Leaf]:
    if x.is_floating_point():
        yield _Leaf(x.detach().requires_grad_())
        return
    leaf = _Leaf(x)

    def hook(_module: nn.Module, arguments: tuple, out: Tensor) -> Tensor | None:
        # The first look-up of the tokens themselves; tables of positions are left alone.
        if leaf.embedded is None and arguments and arguments[0].shape == x.shape and out.shape[:2] == x.shape:
            leaf.embedded = out.detach().requires_grad_()
            return leaf.embedded
        return None

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield leaf
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class StateNorms:
    """names: of the leaves of the state. norms: (leaves, L), after each token. sizes: (leaves, L), how many numbers."""

    names: tuple[str, ...]
    norms: Tensor
    sizes: Tensor
    what: str


@torch.no_grad()
def state_norms(model: Causal, x: Tensor, seg: Segments | None = None) -> StateNorms:
    """Norm and size of each part of the state of a mixer or model while it reads x token by token, averaged over rows.

    A state that explodes, dies or is still growing at the end shows here.

    Raises:
        TypeError: it has no state.
    """
    if not isinstance(model, Causal):
        raise TypeError(f"state_norms: model: want a causal mixer or model, which has a state, got {model!r:.80}")
    if x.ndim < 2 or 0 in x.shape[:2]:
        raise ValueError(f"state_norms: x: want (B, L) or (B, L, D) with at least one token, got {tuple(x.shape)}")
    dtype = torch.promote_types(_dtype(model, x), torch.float32)
    state, rows, sizes = model.init_state(len(x), device=x.device, dtype=dtype), [], []
    names: tuple[str, ...] = ()
    for t in range(x.shape[1]):
        state = model.extend(x[:, t : t + 1], state, None if seg is None else seg[:, t : t + 1])[1]
        parts = [(n, s) for n, s in states.leaves(state) if s.is_floating_point() or s.is_complex()]
        names = tuple(n for n, _ in parts)
        rows.append([s.detach().abs().double().flatten(1).square().sum(1).sqrt().mean() for _, s in parts])
        sizes.append([s.numel() // len(x) for _, s in parts])
    norms = torch.tensor(rows, dtype=torch.float64).mT
    return StateNorms(names, norms, torch.tensor(sizes).mT, type(model).__name__)
