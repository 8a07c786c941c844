"""A module under test, the ways through it, and how they are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import state as S
from ..mixers.base import SequenceMixer
from ..segments import Segments
from ..state import State
from .cases import generator_for
from .tolerance import assert_agree, assert_no_worse, assert_zero, disturbed, double, require, scale

# How much more wrong than its own forward pass in float32 another way through a module may be.
FACTOR = 4.0
BATCH, LENGTH, NEXT = 3, 13, 3
KINDS = ("mixed", "packed", "left pad", "right pad", "middle pad", "reset at Q", "nothing valid")

Outcome = dict[str, Tensor]
# A way through a module: (subject, module, inputs) -> what it computes.
Way = Callable[["Subject", nn.Module, Tensor], Outcome]


@dataclass(frozen=True)
class Subject:
    """A module under test.

    Args:
        build: makes the module, the same each time but for its random weights.
        d_model: width of its inputs (B, L, d_model), or None for a module that takes tokens.
        vocab: number of tokens, for a module that takes tokens (B, L).
    """

    build: Callable[[], nn.Module]
    d_model: int | None = None
    vocab: int | None = None
    cache: dict[str, nn.Module] = field(default_factory=dict, compare=False)

    def _made(self) -> nn.Module:
        """The module that all others are copies of."""
        if "float32" not in self.cache:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                module = self.build().eval()
                with torch.no_grad():
                    for p in module.parameters():
                        p.add_(0.05 * torch.randn_like(p))
            self.cache["float32"] = module
        return self.cache["float32"]

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module in evaluation mode. Parameters are moved off values that would hide a mistake, such as zeros."""
        return convert(self._made(), double) if dtype == torch.float64 else copy.deepcopy(self._made())

    @property
    def kind(self) -> type[nn.Module]:
        return type(self._made())

    @property
    def name(self) -> str:
        return self.kind.__name__

    def draw(self, batch: int, length: int, *names: object) -> Tensor:
        generator = generator_for(*names, batch, length)
        if self.vocab is not None:
            return torch.randint(0, self.vocab, (batch, length), generator=generator)
        assert self.d_model is not None
        return torch.randn(batch, length, self.d_model, generator=generator)

    def hide(self, x: Tensor, seg: Segments | None) -> Tensor:
        """Something else at padding: other tokens; NaN where the module promises zeros; large numbers elsewhere."""
        if seg is None or seg.valid is None:
            return x
        valid = seg.valid if x.ndim == 2 else seg.valid[..., None]
        if self.vocab is not None:
            return torch.where(valid, x, (x + 1) % self.vocab)
        rubbish = torch.nan if issubclass(self.kind, SequenceMixer) else 1e3
        return x.masked_fill(~valid, rubbish)


def convert(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy with `change` applied to each parameter and buffer (`nn.Module.to` would drop imaginary parts)."""
    return copy.deepcopy(module)._apply(lambda t: change(t) if t.is_floating_point() or t.is_complex() else t)


def with_grads(way: Way, subject: Subject, module: nn.Module, x: Tensor) -> Outcome:
    """What `way` computes, and the gradients that it gives every parameter, x and every start of a state."""
    if x.is_floating_point():
        x = x.detach().requires_grad_()
    out = way(subject, module, x)
    starts = {name: t for name, t in out.items() if name.startswith("start")}
    out = {name: t for name, t in out.items() if name not in starts}
    leaves = {**dict(module.named_parameters()), **starts, **({"x": x} if x.requires_grad else {})}
    live = [(name, t) for name, t in out.items() if t.requires_grad]
    require(bool(live), f"{subject.name}: nothing that is computed has a gradient")
    weights = [torch.randn(t.shape, generator=generator_for(name)).to(torch.bfloat16).to(t.dtype) for name, t in live]
    grads = torch.autograd.grad(
        [t for _, t in live], list(leaves.values()), weights, allow_unused=True, materialize_grads=True
    )
    return {name: t.detach() for name, t in out.items()} | {f"gradient of {n}": g for n, g in zip(leaves, grads)}


def without_grads(way: Way, subject: Subject, module: nn.Module, x: Tensor) -> Outcome:
    """What `way` computes when nothing is recorded for a gradient, as in serving."""
    with torch.no_grad():
        return {name: t for name, t in way(subject, module, x).items() if not name.startswith("start")}


def compare(
    subject: Subject,
    law: str,
    truth: Way,
    ways: Mapping[str, Way],
    x: Tensor,
    *,
    wide: bool = True,
    single: bool = True,
    grads: bool = True,
) -> None:
    """Every way agrees with `truth`: in float64 (if `wide`) to rounding, in float32 (if `single`) as honest rounding
    allows."""
    evaluate = with_grads if grads else without_grads
    plain32, exact = subject.module(), subject.module(torch.float64)
    x64 = double(x)
    want = evaluate(truth, subject, exact, x64)
    largest = max((scale(t) for name, t in want.items() if name.startswith("gradient")), default=0.0)
    for name, way in ways.items() if wide else ():
        got = evaluate(way, subject, exact, x64)
        for part, right in want.items():
            what = f"{subject.name}: {law}: {name}: {part}"
            require(part in got, f"{what}: missing")
            assert_agree(got[part], right, what, x.shape[1], at_least=largest if "gradient" in part else 0.0)
    if not single:
        return
    plain = evaluate(truth, subject, plain32, x)
    generator = generator_for("rounding", law)
    near = convert(exact, lambda t: disturbed(t, generator))
    rounded = evaluate(truth, subject, near, disturbed(x64, generator))
    for name, way in ways.items():
        got = evaluate(way, subject, plain32, x)
        for part, right in want.items():
            what = f"{subject.name}: {law}: {name}: {part}, float32"
            require(part in got, f"{what}: missing")
            assert_no_worse(got[part], plain[part], right, FACTOR, what, rounded=rounded[part])


# ---- ways through a module ------------------------------------------------------------------------------------------


def _dtype(module: nn.Module) -> torch.dtype:
    """Real dtype of the module's states."""
    parameter = next(module.parameters())
    return torch.empty(0, dtype=parameter.dtype).real.dtype if parameter.is_complex() else parameter.dtype


def fresh(module: Any, batch: int, capacity: int | None = None) -> State:
    return module.init_state(batch, capacity=capacity, dtype=_dtype(module))


def follow(subject: Subject, module: Any, state: State, batch: int) -> Tensor:
    """Outputs of a few more positions: what a state means, whatever its layout."""
    x = subject.draw(batch, NEXT, "next")
    return module.extend(x.to(_dtype(module)) if x.is_floating_point() else x, S.clone(state))[0]


def history(subject: Subject, module: Any, batch: int) -> State:
    """A state that has seen a few positions, cut off from the graph, as leaves that require gradients."""
    x = subject.draw(batch, 4, "history")
    with torch.no_grad():
        state = module.extend(x.to(_dtype(module)) if x.is_floating_point() else x, fresh(module, batch))[1]
    return S.map_state(lambda t: t.clone().requires_grad_(t.is_floating_point() or t.is_complex()), state)


def _starts(state: State) -> Outcome:
    return {f"start ({name})": t for name, t in S.leaves(state) if t.requires_grad}


def visible(y: Tensor, seg: Segments | None, module: nn.Module) -> Tensor:
    """y without padding; a mixer promises zeros there, a block or model promises nothing."""
    if seg is None or seg.valid is None:
        return y
    if isinstance(module, SequenceMixer):
        assert_zero(y[~seg.valid], f"{type(module).__name__}: y at padding")
    return seg.mask(y)


def whole(subject: Subject, module: nn.Module, x: Tensor, *, seg: Segments | None = None) -> Outcome:
    return {"y": visible(module(subject.hide(x, seg), seg), seg, module)}


def one_by_one(subject: Subject, module: nn.Module, x: Tensor, *, seg: Segments) -> Outcome:
    """Each document alone, its valid positions only."""
    rows = []
    for b in range(len(x)):
        y: Tensor | None = None
        for where in _documents(seg, b):
            part = module(x[b : b + 1, where])
            y = part.new_zeros(1, x.shape[1], *part.shape[2:]) if y is None else y
            y = y.index_copy(1, where, part)
        rows.append(y)
    some = next(y for y in rows if y is not None)
    return {"y": torch.cat([torch.zeros_like(some) if y is None else y for y in rows])}


def _documents(seg: Segments, row: int) -> list[Tensor]:
    """Positions of each document of a row, valid ones only."""
    valid, document = seg.marks[row] != 2, seg.document[row]
    return [where for d in document.unique() if len(where := (valid & (document == d)).nonzero()[:, 0])]


def from_state(subject: Subject, module: Any, x: Tensor, *, seg: Segments | None, cuts: Sequence[int] = ()) -> Outcome:
    """`extend` in pieces, from a state with a history."""
    state = start = history(subject, module, len(x))
    hidden, bounds, ys = subject.hide(x, seg), [0, *cuts, x.shape[1]], []
    state = S.clone(state)
    for a, b in pairwise(bounds):
        piece = None if seg is None else seg[:, a:b]
        y, state = module.extend(hidden[:, a:b], state, piece)
        ys.append(visible(y, piece, module))
    return {"y": torch.cat(ys, 1), "what follows": follow(subject, module, state, len(x)), **_starts(start)}


def from_state_one_by_one(subject: Subject, module: Any, x: Tensor, *, seg: Segments) -> Outcome:
    """The same, document by document and row by row."""
    start = history(subject, module, len(x))
    ys, after = [], []
    follow = subject.draw(len(x), NEXT, "next")
    follow = follow.to(_dtype(module)) if follow.is_floating_point() else follow
    for b in range(len(x)):
        state = S.clone(S.select(start, [b]))
        y: Tensor | None = None
        for where in _documents(seg, b):
            if bool(seg.resets[b, where[0]]):
                state = fresh(module, 1)
            part, state = module.extend(x[b : b + 1, where], state)
            y = part.new_zeros(1, x.shape[1], *part.shape[2:]) if y is None else y
            y = y.index_copy(1, where, part)
        ys.append(y)
        after.append(module.extend(follow[b : b + 1], state)[0])
    some = next(y for y in ys if y is not None)
    y = torch.cat([torch.zeros_like(some) if y is None else y for y in ys])
    return {"y": y, "what follows": torch.cat(after), **_starts(start)}


def run(subject: Subject, module: Any, x: Tensor) -> Outcome:
    """The whole from an empty state."""
    y, state = module.extend(x, None)
    return {"y": y, "what follows": follow(subject, module, state, len(x))}


def steps(subject: Subject, module: Any, x: Tensor, *, capacity: int | None = None) -> Outcome:
    state, ys = fresh(module, len(x), capacity), []
    for t in range(x.shape[1]):
        y, state = module.step(x[:, t], state)
        ys.append(y)
    return {"y": torch.stack(ys, 1), "what follows": follow(subject, module, state, len(x))}


def shuffled(subject: Subject, module: Any, x: Tensor, *, seg: Segments | None) -> Outcome:
    order = torch.roll(torch.arange(len(x)), 1)
    y = whole(subject, module, x[order], seg=None if seg is None else seg[order])["y"]
    return {"y": y[torch.argsort(order)]}


def _weights(y: Tensor) -> Tensor:
    """Of outputs (B, ...) in a sum, the same for each row."""
    return torch.randn(y.shape[1:], generator=generator_for("y")).to(y.dtype)


def slopes(subject: Subject, module: nn.Module, x: Tensor) -> Outcome:
    """Gradients of all parameters, which can be differentiated further."""
    parameters = dict(module.named_parameters())
    # The square, so that second derivatives of a linear map are not zero.
    y = module(x).square()
    found = torch.autograd.grad((_weights(y) * y).sum(), list(parameters.values()), create_graph=True)
    return {f"slope of {name}": g for name, g in zip(parameters, found)}


def row_by_row(subject: Subject, module: nn.Module, x: Tensor, *, seg: Segments | None) -> Outcome:
    """Outputs, and gradients of all parameters, for each row."""
    with torch.enable_grad():
        parts = [None if seg is None else seg[b : b + 1] for b in range(len(x))]
        ys = [_shown(module(row[None], part), part) for row, part in zip(x, parts)]
        rows = [torch.autograd.grad((_weights(y) * y).sum(), list(module.parameters())) for y in ys]
    names = [name for name, _ in module.named_parameters()]
    return {"y": torch.cat(ys)} | {f"gradients of {name}": torch.stack(gs) for name, gs in zip(names, zip(*rows))}


def rows_at_once(subject: Subject, module: nn.Module, x: Tensor, *, seg: Segments | None) -> Outcome:
    """The same by transforms."""
    weights = _weights(module(x))
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    if seg is None:
        rows: tuple[Tensor, ...] = (x,)
    else:
        rows = (x, seg.position, torch.ones_like(seg.resets) if seg.valid is None else seg.valid)

    def outputs(parameters: dict[str, Tensor], row: Tensor, *marks: Tensor) -> Tensor:
        part = Segments(*(t[None] for t in marks)) if marks else None
        return _shown(torch.func.functional_call(module, parameters, (row[None], part)), part)[0]

    def number(parameters: dict[str, Tensor], *row: Tensor) -> Tensor:
        return (weights * outputs(parameters, *row)).sum()

    axes = (None, *[0] * len(rows))
    found = torch.func.vmap(torch.func.grad(number), axes)(parameters, *rows)
    y = torch.func.vmap(outputs, axes)(parameters, *rows)
    return {"y": y} | {f"gradients of {name}": g for name, g in found.items()}


def _tangents(module: nn.Module) -> dict[str, Tensor]:
    return {n: torch.randn(p.shape, generator=generator_for(n)).to(p.dtype) for n, p in module.named_parameters()}


def pushed(subject: Subject, module: nn.Module, x: Tensor) -> Outcome:
    """The derivative of the outputs along a direction of all parameters, by gradients of gradients."""
    with torch.enable_grad():
        y = module(x)
        v = torch.zeros_like(y, requires_grad=True)
        slopes = torch.autograd.grad(y, list(module.parameters()), v, create_graph=True, allow_unused=True)
        pairs = [(g, t) for g, t in zip(slopes, _tangents(module).values()) if g is not None]
        (out,) = torch.autograd.grad([g for g, _ in pairs], [v], [t for _, t in pairs])
    return {"derivative": out}


def pushed_forward(subject: Subject, module: nn.Module, x: Tensor) -> Outcome:
    """The same by differentiation forward."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))

    return {"derivative": torch.func.jvp(outputs, (parameters,), (_tangents(module),))[1]}


def _shown(y: Tensor, seg: Segments | None) -> Tensor:
    return y if seg is None else seg.mask(y)
