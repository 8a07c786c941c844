"""The cases that every op and mixer is tried on: lengths, packing, padding, states, dtypes, memory layouts."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops._checks import compute_dtype
from ..ops._spec import OpSpec
from ..segments import Segments
from ..state import State, leaves, map_state, select
from .tolerance import double

# How the rows of a batch are laid out in time. "mixed" is every feature at once, drawn at random.
SEGMENTS = (
    "none",
    "mixed",
    "packed",
    "left pad",
    "right pad",
    "middle pad",
    "continuing",
    "continuing pad",
    "reset at 0",
    "reset at Q",
    "nothing valid",
)
STATES = ("random", "none", "zero")
DECAYS = ("mixed", "slow", "fast")
LAYOUTS = ("plain", "strided", "expanded")


def generator_for(*names: object) -> torch.Generator:
    """A CPU generator whose seed is a function of the names, the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32("|".join(map(str, names)).encode()))


def lengths(chunk: int) -> tuple[int, ...]:
    """Lengths at which code over chunks of `chunk` positions goes wrong, and a prime."""
    prime = next(n for n in itertools.count(2 * chunk + 1) if all(n % d for d in range(2, n)))
    return tuple(dict.fromkeys((chunk + 1, 3 * chunk + 5, prime, chunk, chunk - 1, 2, 1, 0)))


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A short list of combinations in which every two levels of every two factors meet. Deterministic; where a level is
    free, the first one of its factor is taken, so put the most usual level first."""
    names = list(factors)
    missing = {
        (m, i, n, j): None
        for m, n in itertools.combinations(names, 2)
        for i in range(len(factors[m]))
        for j in range(len(factors[n]))
    }
    if len(names) == 1:
        return [{names[0]: level} for level in factors[names[0]]]

    def gain(row: dict[str, int], name: str, level: int) -> int:
        pairs = (
            (m, i, name, level) if names.index(m) < names.index(name) else (name, level, m, i) for m, i in row.items()
        )
        return sum(pair in missing for pair in pairs)

    rows = []
    while missing:
        m, i, n, j = next(iter(missing))
        row = {m: i, n: j}
        for name in names:
            if name not in row:
                row[name] = max(range(len(factors[name])), key=lambda k: gain(row, name, k))
        for (a, x), (b, y) in itertools.combinations([(name, row[name]) for name in names], 2):
            missing.pop((a, x, b, y), None)
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def segments(kind: str, batch: int, length: int, chunk: int, generator: torch.Generator) -> Segments | None:
    """A Segments of the named kind (see SEGMENTS) for `batch` rows, each row different where the kind allows."""

    def draw(high: int) -> int:
        return int(torch.randint(max(high, 1), (), generator=generator))

    at = torch.arange(length).expand(batch, length)
    if kind == "none":
        return None
    if kind == "packed":
        rows = []
        for b in range(batch):
            cuts = sorted(draw(length + 1) for _ in range(2 + b))
            rows.append([q - p for p, q in zip([0, *cuts], [*cuts, length])])
        return Segments.pack(rows, total=length)
    if kind in ("left pad", "right pad"):
        sizes = [length - draw(length // 2 + 1) - (b == 0 and length > 1) for b in range(batch)]
        return Segments.from_lengths(sizes, length, side=kind.split()[0])
    if kind == "middle pad":
        hole = [draw(length) for _ in range(batch)]
        valid = torch.stack([~((row >= h) & (row < h + length // 3 + 1)) for row, h in zip(at, hole)])
        return Segments.from_valid(valid)
    if kind == "continuing":
        # Row b goes on with a document from position 3 + b, and a new one begins later in the row.
        position = at + 3 + torch.arange(batch)[:, None]
        begin = torch.tensor([draw(length) for _ in range(batch)])[:, None]
        return Segments(torch.where(at >= begin, at - begin, position))
    if kind == "continuing pad":
        valid = torch.rand(batch, length, generator=generator) < 0.7
        return Segments.from_valid(valid, start=torch.arange(1, batch + 1))
    if kind == "reset at 0":
        return Segments.continuing(batch, length, start=0)
    if kind == "reset at Q":
        return Segments(torch.where(at >= chunk, at - chunk, at + 1))
    if kind == "nothing valid":
        # The last row keeps its tokens, so that a batch of three holds both sorts.
        valid = torch.zeros(batch, length, dtype=torch.bool)
        valid[2:] = True
        return Segments.from_valid(valid, start=1)
    if kind == "mixed":
        valid = torch.rand(batch, length, generator=generator) < 0.8
        position = at + 1
        begin = torch.where(torch.rand(batch, length, generator=generator) < 0.15, at, -1).cummax(1).values
        return Segments(torch.where(begin >= 0, at - begin, position), valid)
    raise ValueError(f"kind: want one of {', '.join(SEGMENTS)}, got {kind!r}")


@dataclass(frozen=True)
class Case:
    """What is fixed before inputs are drawn."""

    variant: str
    length: int
    batch: int = 3
    state: str = "random"
    seg: str = "none"
    decay: str = "mixed"
    dtype: torch.dtype = torch.float32
    layout: str = "plain"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        extra = "" if self.layout == "plain" else f",{self.layout}"
        return (
            f"{self.variant},L{self.length},B{self.batch},state={self.state},seg={self.seg},{self.decay},{dtype}{extra}"
        )


@dataclass(frozen=True)
class Call:
    """The arguments of one call of an op."""

    spec: OpSpec
    inputs: dict[str, Any]
    state: State = None
    seg: Segments | None = None

    @property
    def value(self) -> Tensor:
        return self.inputs[self.spec.value]

    @property
    def batch(self) -> int:
        return self.value.shape[0]

    @property
    def length(self) -> int:
        return self.value.shape[1]

    def map(self, fn) -> Call:
        """`fn(name, tensor)` on each tensor of inputs and state."""
        inputs = {k: fn(k, v) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        named = dict(leaves(self.state))
        moved = iter([fn(f"state.{name}", t) for name, t in named.items()])
        return replace(self, inputs=inputs, state=map_state(lambda _: next(moved), self.state))

    def _timed(self, fn) -> dict[str, Any]:
        return {k: fn(v) if k in self.spec.timed and isinstance(v, Tensor) else v for k, v in self.inputs.items()}

    def chunk(self, start: int, stop: int) -> Call:
        """Positions [start, stop), with no state. An axis of size 1 that is broadcast over time stays."""
        length = self.length
        inputs = self._timed(lambda t: t[:, start:stop] if t.ndim > 1 and t.shape[1] == length else t)
        return replace(self, inputs=inputs, state=None, seg=None if self.seg is None else self.seg[:, start:stop])

    def at(self, t: int) -> dict[str, Any]:
        """Inputs at one time, as `step` takes them."""
        return self._timed(lambda x: x[:, min(t, x.shape[1] - 1)] if x.ndim > 1 else x)

    def rows(self, index: Tensor) -> Call:
        """The given rows of inputs, state and segments."""
        batch = self.batch
        inputs = self._timed(lambda t: t[index] if t.ndim > 1 and t.shape[0] == batch else t)
        state = None if self.state is None else select(self.state, index)
        return replace(self, inputs=inputs, state=state, seg=None if self.seg is None else self.seg[index])

    def gather(self, row: int, index: Tensor) -> Call:
        """Row `row` at the positions `index` only, as a batch of one with neither state nor segments."""
        alone, length = self.rows(torch.tensor([row])), self.length
        inputs = alone._timed(lambda t: t[:, index] if t.ndim > 1 and t.shape[1] == length else t)
        return replace(self, inputs=inputs, state=None, seg=None)

    def double(self) -> Call:
        return self.map(lambda _, t: double(t.detach()))

    def leaf(self) -> tuple[Call, dict[str, Tensor]]:
        """Copies that require gradients (views keep their strides), and those copies by name."""
        fresh: dict[str, Tensor] = {}

        def prepare(name: str, t: Tensor) -> Tensor:
            t = t.detach()
            if t.is_floating_point() or t.is_complex():
                fresh[name] = t = t.requires_grad_()
            return t

        return self.map(prepare), fresh


def _lay_out(t: Tensor, layout: str) -> Tensor:
    if layout == "strided" and t.numel():
        # Every second element of a larger memory, with the last two axes exchanged in it.
        wide = torch.repeat_interleave(t.transpose(-1, -2) if t.ndim > 1 else t, 2, -1)[..., ::2]
        return wide.transpose(-1, -2) if t.ndim > 1 else wide
    if layout == "expanded" and t.shape[0] > 1:
        return t[:1].expand_as(t)
    return t


def draw(spec: OpSpec, case: Case, *, nan_padding: bool = True, device: str = "cpu") -> Call:
    """The inputs of a case. Values at invalid positions are NaN in every timed input, unless told otherwise."""
    cases, generator = spec.load_cases(), generator_for(spec.name, case)

    def sample(length: int) -> dict[str, Any]:
        return cases.sample(case.variant, case.batch, length, dtype=case.dtype, decay=case.decay, generator=generator)

    call = Call(spec, sample(case.length))
    if case.state != "none":
        # A state that the op itself made, with the same coefficients: its own kind of tree, and values it can reach.
        other = sample(5 if case.state == "random" else 0)
        before = replace(call, inputs={k: other[k] if k in spec.timed else v for k, v in call.inputs.items()})
        before = before.map(lambda _, t: t.to(compute_dtype(t)))
        state = map_state(torch.detach, spec.reference(**before.inputs, state=None, seg=None)[1])
        call = replace(call, state=map_state(torch.clone, state))
    seg = segments(case.seg, case.batch, case.length, spec.chunk, generator)
    call, layout = replace(call, seg=seg), case.layout
    if seg is not None and seg.valid is not None:
        hidden = ~seg.valid
        layout = "strided" if layout == "expanded" else layout  # rows that share memory cannot differ in padding

        def poison(t: Tensor) -> Tensor:
            if t.ndim < 2 or t.shape[:2] != hidden.shape:
                return t
            return t.masked_fill(hidden.reshape(hidden.shape + (1,) * (t.ndim - 2)), torch.nan)

        if nan_padding:
            call = replace(call, inputs=call._timed(poison))
    if device != "cpu":
        call = replace(call.map(lambda _, t: t.to(device)), seg=None if seg is None else seg.to(device))
    # Last, since a move to a device makes memory dense.
    return replace(call, inputs=call._timed(lambda t: _lay_out(t, layout)))
