"""The ways in which one call of an op can be computed, and how they are compared."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops._checks import compute_dtype
from ..ops._spec import Summary, combine
from ..state import State, clone, leaves, merge, select
from .cases import Call, Case, draw, generator_for
from .tolerance import assert_agree, assert_no_worse, assert_zero, disturbed, double, require, scale

Outcome = dict[str, Tensor]
Way = Callable[[Call], tuple[Tensor, State]]


# ---- the definition, without Segments -------------------------------------------------------------------------------


def by_documents(call: Call) -> tuple[Tensor, State]:
    """What a call means, spelled out: each document alone, its valid tokens only, through the reference."""
    spec = call.spec
    if call.seg is None:
        return spec.reference(**call.inputs, state=call.state, seg=None)
    valid, resets = call.seg.marks != 2, call.seg.resets
    ys: list[Tensor] = []
    states: list[State] = []
    for b in range(call.batch):
        where = valid[b].nonzero()[:, 0]
        begins = [i for i, t in enumerate(where.tolist()) if bool(resets[b, t])]
        cuts = [0, *begins, len(where)]
        state = None if call.state is None else select(call.state, [b])
        parts = []
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            if i and start in begins:
                state = None
            if start == stop and not (i == 0 and not begins):
                continue
            y, state = spec.reference(**call.gather(b, where[start:stop]).inputs, state=state, seg=None)
            parts.append(y)
        row = torch.cat(parts, 1)
        whole = row.new_zeros(1, call.length, *row.shape[2:])
        ys.append(whole.index_copy(1, where, row))
        states.append(state)
    return torch.cat(ys), merge(states)


# ---- other ways -----------------------------------------------------------------------------------------------------


def by_run(call: Call, **options: Any) -> tuple[Tensor, State]:
    return call.spec.run(**call.inputs, state=call.state, seg=call.seg, **options)


def by_definition(call: Call) -> tuple[Tensor, State]:
    """The reference; half precision is widened for it, and y is stored in half precision again."""
    wide = call.map(lambda _, t: t.to(compute_dtype(t)))
    y, state = call.spec.reference(**wide.inputs, state=wide.state, seg=wide.seg)
    return y.to(call.value.dtype), state


def by_steps(call: Call) -> tuple[Tensor, State]:
    assert call.spec.step is not None
    state, ys = clone(call.state), []
    for t in range(call.length):
        y, state = call.spec.step(**call.at(t), state=state)
        ys.append(y)
    return torch.stack(ys, 1), state


def by_extend(call: Call, cuts: tuple[int, ...]) -> tuple[Tensor, State]:
    bounds, state, ys = [0, *cuts, call.length], clone(call.state), []
    for start, stop in itertools.pairwise(bounds):
        y, state = by_run(replace(call.chunk(start, stop), state=state))
        ys.append(y)
    return torch.cat(ys, 1), state


def by_shuffled_rows(call: Call) -> tuple[Tensor, State]:
    order = torch.roll(torch.arange(call.batch), 1)
    y, state = by_run(call.rows(order))
    back = torch.argsort(order)
    return y[back], select(state, back)


def by_shards(call: Call, count: int) -> tuple[Tensor, State]:
    """Each shard runs from nothing; what the shards before it would have handed over comes in through `carry`."""
    spec = call.spec
    assert spec.summary is not None
    assert spec.carry is not None
    bounds = [r * call.length // count for r in range(count + 1)]
    shards = [call.chunk(start, stop) for start, stop in itertools.pairwise(bounds)]
    summaries = [spec.summary(**shard.inputs, seg=shard.seg) for shard in shards]
    ys: list[Tensor] = []
    before: Summary | None = None
    for shard, summary in zip(shards, summaries):
        state = call.state if before is None else _arrive(before, call.state)
        y = by_run(shard)[0]
        if state is not None:
            y = y + spec.carry(**_coefficients(spec.carry, shard), state=state, seg=shard.seg)
        ys.append(y)
        before = summary if before is None else combine(before, summary)
    assert before is not None
    return torch.cat(ys, 1), _arrive(before, call.state)


def _arrive(summary: Summary, state: State) -> State:
    return summary.state if state is None else summary.transition * state + summary.state


def by_matrix(call: Call) -> tuple[Tensor, State]:
    spec = call.spec
    assert spec.matrix is not None
    assert spec.apply is not None
    return spec.apply(spec.matrix(**_coefficients(spec.matrix, call), seg=call.seg), call.value), None


def _coefficients(view: Callable, call: Call) -> dict[str, Any]:
    """All inputs but the value; and the length, which the coefficients of a time-invariant system do not tell."""
    extra = {"length": call.length} if "length" in inspect.signature(view).parameters else {}
    return {k: v for k, v in call.inputs.items() if k != call.spec.value} | extra


# ---- comparing ------------------------------------------------------------------------------------------------------


def fixed_state(call: Call) -> bool:
    """Whether the state has one size whatever the length; a growing cache is compared by what follows it."""
    if call.spec.summary is not None:
        return True
    shapes = []
    for length in (2, 5):
        other = draw(call.spec, Case(next(iter(call.spec.load_cases().VARIANTS)), length, 1, state="none"))
        shapes.append([t.shape for _, t in leaves(by_definition(other)[1])])
    return shapes[0] == shapes[1]


def _results(way: Way, call: Call, probe: Call | None, state: bool) -> Outcome:
    y, end = way(call)
    out: Outcome = {"y": y}
    if state and probe is None:
        out |= {f"state out ({name})": t for name, t in leaves(end)}
    elif state and probe is not None:
        inputs = {k: call.inputs[k] if k not in call.spec.timed else v for k, v in probe.inputs.items()}
        out["what follows the state"] = by_definition(Call(call.spec, inputs, end))[0]
    return out


def _cotangents(parts: Mapping[str, Tensor]) -> list[Tensor]:
    """Numbers that bfloat16 holds exactly, so that every dtype is asked for the same gradient."""
    return [
        torch.randn(t.shape, generator=generator_for(name, t.shape)).to(torch.bfloat16).to(t.dtype).to(t.device)
        for name, t in parts.items()
    ]


def outcome(
    way: Way, call: Call, probe: Call | None, *, state: bool = True, grads: bool = True, seconds: bool = False
) -> Outcome:
    """y, the state and all gradients of `way(call)`, by name.

    Args:
        probe: None to compare the state leaf by leaf; otherwise further inputs, and the state is seen through the
            outputs that the reference gives on them when it goes on from it.
        state: include the state that is returned.
        grads: with gradients; without, nothing is recorded, so that kernels which only decode are reached.
        seconds: with the gradients of those gradients as well.
    """
    call, fresh = call.leaf() if grads else (call, {})
    with torch.set_grad_enabled(grads):
        out = _results(way, call, probe, state)
    if not grads:
        return out

    def differentiate(of: Outcome, what: str, **options: bool) -> Outcome:
        live = {name: t for name, t in of.items() if t.requires_grad}
        found: tuple[Tensor, ...] = tuple(torch.zeros_like(t) for t in fresh.values())
        if live:
            found = torch.autograd.grad(
                list(live.values()), list(fresh.values()), _cotangents(live), allow_unused=True, materialize_grads=True,
                **options,
            )  # fmt: skip
        return {f"{what} of {name}": g for name, g in zip(fresh, found)}

    first = differentiate(out, "gradient", create_graph=seconds)
    second = differentiate(first, "second gradient") if seconds else {}
    return {name: t.detach() for name, t in (out | first | second).items()}


def compare(
    call: Call, case: Case, ways: Mapping[str, Way], *, state: bool = True, grads: bool = True, seconds: bool = False
) -> None:
    """Every way agrees with the definition applied document by document in float64."""
    spec, dtype, what = call.spec, call.value.dtype, f"{call.spec.name} {case}"
    factor = float(spec.load_cases().FACTOR)
    probe = None
    if state and not fixed_state(call):
        following = Case(case.variant, 4, call.batch, state="none", dtype=dtype)
        probe = draw(spec, following, device=str(call.value.device))
    probe64 = None if probe is None else probe.double()
    truth = outcome(by_documents, call.double(), probe64, state=state, grads=grads, seconds=seconds)
    plain = outcome(by_definition, call, probe, state=state, grads=grads, seconds=seconds)
    exact, rounded = double(call.value).dtype == dtype, truth
    if not exact:
        generator = generator_for("rounding", what)
        near = call.double().map(lambda _, t: disturbed(t, generator))
        rounded = outcome(by_documents, near, probe64, state=state, grads=grads, seconds=seconds)
    # A gradient that is zero because large terms cancel is zero only to rounding of those.
    largest = max((scale(t) for name, t in truth.items() if "gradient" in name), default=0.0)
    for name, way in ways.items():
        got = outcome(way, call, probe, state=state, grads=grads, seconds=seconds)
        for part, want in truth.items():
            label = f"{what}: {name}: {part}"
            require(part in got, f"{label}: missing; there is {', '.join(got)}")
            if exact or (not want.dtype.is_floating_point and not want.is_complex()):
                assert_agree(got[part], want, label, call.length, at_least=largest if "gradient" in part else 0.0)
            else:
                assert_no_worse(got[part], plain[part], want, factor, label, rounded=rounded[part])
        require(got["y"].dtype == dtype, f"{what}: {name}: y is {got['y'].dtype}, want {dtype} like {spec.value}")
        if call.seg is not None and call.seg.valid is not None:
            hidden = ~call.seg.valid
            assert_zero(got["y"][hidden], f"{what}: {name}: y at padding")
            for k in spec.timed if grads else ():
                t = call.inputs.get(k)
                if isinstance(t, Tensor) and f"gradient of {k}" in got and t.shape[:2] == hidden.shape:
                    for g in (f"gradient of {k}", *([f"second gradient of {k}"] if seconds else [])):
                        assert_zero(got[g][hidden], f"{what}: {name}: {g} at padding")
