"""The laws of an op. Each law computes the same thing in another way, and every way has to agree with the definition in
outputs, in the state it returns, and in the gradients of every input and of the incoming state.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops._backend import resolve
from ..ops._spec import OpSpec
from ..state import leaves
from . import cases as C
from .cases import Call, Case, draw, generator_for, pairwise
from .poison import poisoned_empty
from .tolerance import assert_agree, double, eps, require, scale
from .ways import (
    Way,
    by_definition,
    by_extend,
    by_matrix,
    by_run,
    by_shards,
    by_shuffled_rows,
    by_steps,
    compare,
)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Law(NamedTuple):
    """`check()` raises LawError if the law does not hold."""

    name: str
    check: Callable[[], None]


def serving(call: Call) -> list[str]:
    """The back-ends that can serve a call."""
    return [name for name, reason in call.spec.reasons(**call.inputs).items() if reason is None]


def algorithms(spec: OpSpec) -> tuple[str, ...]:
    """The values of the op's `algorithm` argument: ALGORITHMS of the module that defines the op."""
    if "algorithm" not in inspect.signature(spec.run).parameters:
        return ()
    return tuple(sys.modules[spec.run.__module__].ALGORITHMS)


# ---- the laws -------------------------------------------------------------------------------------------------------


def _unchanged(call: Call, what: str, before: Call) -> None:
    was = before.inputs
    for name, t in call.inputs.items():
        if isinstance(t, Tensor):
            same = torch.allclose(t.detach(), was[name], rtol=0, atol=0, equal_nan=True)
            require(same, f"{what}: the op changed its input {name}")


def check_definition(spec: OpSpec, case: Case, device: str) -> None:
    """Laws 3, 4, 9 and 11: every back-end, on packed and padded rows too, with all gradients."""
    call = draw(spec, case, device=device)
    before = call.map(lambda _, t: t.detach().clone())
    ways: dict[str, Way] = {"the default": by_run}
    # One of them is the default (`check_registration` sees that this is a kernel, if there is one).
    default = resolve(spec.name, spec.reasons(**call.inputs))
    for name in serving(call):
        if name != default:
            ways[f"backend {name}"] = partial(by_run, backend=name)
    compare(call, case, ways)
    _unchanged(call, f"{spec.name} {case}", before)


def check_second_derivatives(spec: OpSpec, case: Case, device: str) -> None:
    """Law 9, third part: gradients of gradients, by every back-end."""
    call = draw(spec, case, device=device)
    ways = {f"backend {name}": partial(by_run, backend=name) for name in serving(call)}
    # An op on kernels of PyTorch says how PyTorch is asked for those that can be differentiated twice.
    with getattr(spec.load_cases(), "TWICE", nullcontext)():
        compare(call, case, ways, seconds=True)


def check_step(spec: OpSpec, case: Case, device: str) -> None:
    """Law 1: step over time == run."""
    half = case.dtype == BF16  # autograd adds the gradients of the steps up in bfloat16, which is not the op's doing
    call = draw(spec, case, device=device)
    for grads in (False,) if half else (False, True):
        compare(call, case, {"step over time": by_steps}, grads=grads)


def check_extend(spec: OpSpec, case: Case, device: str) -> None:
    """Law 2: extend of any split == whole."""
    length, call = case.length, draw(spec, case, device=device)
    cuts: set[tuple[int, ...]] = {(0,), (min(1, length),), (max(length - 1, 0),), (length,), (length // 2,)}
    cuts |= {(length // 3, length // 3, 2 * length // 3)}
    ways = {f"cut at {cut}": partial(by_extend, cuts=cut) for cut in sorted(cuts)}
    for grads in (False,) if case.dtype == BF16 else (False, True):
        compare(call, case, ways, grads=grads)


def check_rows(spec: OpSpec, case: Case, device: str) -> None:
    """Law 8: permuting rows commutes."""
    compare(draw(spec, case, device=device), case, {"permuted rows": by_shuffled_rows})


def check_shards(spec: OpSpec, case: Case, device: str) -> None:
    """Law 10: R shards == whole."""
    ways = {f"{count} shards": partial(by_shards, count=count) for count in (2, 3)}
    compare(draw(spec, case, device=device), case, ways)


def check_algorithms(spec: OpSpec, case: Case, device: str) -> None:
    """All algorithms that the op offers agree."""
    ways = {f"algorithm {name}": partial(by_run, algorithm=name) for name in algorithms(spec)}
    compare(draw(spec, case, device=device), case, ways)


def check_matrix(spec: OpSpec, case: Case, device: str) -> None:
    """Laws 5 and 6: the closed-form matrix, column by column, is the op applied to unit values."""
    call = draw(spec, case, device=device)
    # `apply` multiplies by the matrix and knows nothing of padding, so the value is finite there.
    value = draw(spec, case, device=device, nan_padding=False).value
    inputs = {k: v for k, v in call.inputs.items() if k not in spec.tail}
    call = replace(call, inputs={**inputs, spec.value: value})
    compare(call, case, {"matrix times value": by_matrix}, state=False)
    if double(call.value).dtype != call.value.dtype:
        return
    # Row (b, s) of a larger batch holds row b with its values at every time but s removed.
    B, L = call.batch, call.length
    units = call.rows(torch.arange(B, device=device).repeat_interleave(L))
    keep = torch.eye(L, dtype=torch.bool, device=device).repeat(B, 1)
    keep = keep.reshape(B * L, L, *[1] * (call.value.ndim - 2))
    units = replace(units, inputs={**units.inputs, spec.value: units.value.masked_fill(~keep, 0)})
    label = f"{spec.name} {case}: matrix, one column at a time"
    assert_agree(by_matrix(units)[0], by_definition(units)[0], label, L)


def check_causal(spec: OpSpec, case: Case, device: str) -> None:
    """Law 7: y up to time t has no gradient in anything after t."""
    call, fresh = draw(spec, case, device=device).leaf()
    y, _ = by_run(call)
    for t in {0, case.length // 2, case.length - 2}:
        early = y[:, : t + 1]
        weight = torch.randn(early.shape, generator=generator_for(t)).to(early.dtype).to(device)
        names = [k for k in spec.timed if k in fresh and fresh[k].ndim > 1 and fresh[k].shape[1] == case.length]
        grads = torch.autograd.grad(
            early, [fresh[k] for k in names], weight, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for k, g in zip(names, grads):
            # Fourier transforms leave rounding in the future, so "zero" means: explained by rounding.
            future, allowed = scale(g[:, t + 1 :]), 64 * eps(y.dtype) * max(scale(g), scale(weight))
            require(
                future <= allowed,
                f"{spec.name} {case}: y up to time {t} depends on later {k}: gradient {future:.3g}, "
                f"rounding explains {allowed:.3g}",
            )


def check_gradcheck(spec: OpSpec, case: Case, device: str) -> None:
    """Law 9, second half: the derivatives of the reference are those of finite differences, in float64."""
    call = draw(spec, case, nan_padding=False, device=device)
    call, fresh = call.map(lambda _, t: t.contiguous()).leaf()  # finite differences need memory of their own

    def function(*tensors: Tensor):
        given = dict(zip(fresh, tensors))
        y, state = by_definition(call.map(lambda name, t: given.get(name, t)))
        return (y, *(t for _, t in leaves(state) if t.is_floating_point() or t.is_complex()))

    torch.autograd.gradcheck(function, tuple(fresh.values()), fast_mode=True)


def check_compile(spec: OpSpec, case: Case, device: str) -> None:
    """Law 11: torch.compile has no graph break, and what it makes agrees, forward and backward."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(inputs, state, seg):
        return spec.run(**inputs, state=state, seg=seg)

    torch._dynamo.reset()
    call = draw(spec, case, device=device)
    compare(call, case, {"compiled": lambda call: compiled(call.inputs, call.state, call.seg)})


class _Record(TorchDispatchMode):
    """Collects the calls of operators that this library registers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, tuple, dict]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "statewise":
            present = tuple(a is not None for a in args)
            self.calls.setdefault((func, present), (func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def check_registration(spec: OpSpec, case: Case, device: str) -> None:
    """Law 11: opcheck passes on every operator that the op calls, forward and backward."""
    call, fresh = draw(spec, case, nan_padding=False, device=device).leaf()
    with _Record() as record:
        y, state = by_run(call)
        outputs = [t for t in (y, *(t for _, t in leaves(state))) if t.requires_grad]
        torch.autograd.grad(outputs, list(fresh.values()), [torch.ones_like(t) for t in outputs], allow_unused=True)
    require(
        bool(record.calls), f"{spec.name} {case}: a kernel serves this call, but no statewise:: operator was called"
    )
    for func, args, kwargs in record.calls.values():
        backward = "backward" in func.__name__ or "bwd" in func.__name__

        def prepare(a, backward=backward):
            if not isinstance(a, Tensor):
                return a
            a = a.detach().clone()
            return a.requires_grad_() if a.is_floating_point() and not backward else a

        torch.library.opcheck(func, tuple(prepare(a) for a in args), {k: prepare(a) for k, a in kwargs.items()})


def _cases(spec: OpSpec, **factors) -> list[Case]:
    variants = tuple(spec.load_cases().VARIANTS)
    return [Case(**row) for row in pairwise({"variant": variants, **factors})]


def op_laws(spec: OpSpec, *, device: str = "cpu") -> list[Law]:
    """All laws of an op, each on each of its cases. Which laws apply follows from what the OpSpec declares."""
    variants, Q = tuple(spec.load_cases().VARIANTS), spec.chunk
    every = C.lengths(Q)
    short = (5, Q + 1, 2, 1)
    table: list[tuple[str, Callable[[OpSpec, Case, str], None], list[Case]]] = []

    everything = _cases(
        spec,
        length=every,
        seg=C.SEGMENTS,
        dtype=(F32, F64, BF16),
        state=C.STATES,
        batch=(3, 1),
        decay=C.DECAYS,
        layout=C.LAYOUTS,
    )
    table.append(("definition", check_definition, everything))
    kinds = ("none", "mixed", "packed", "left pad")
    some = _cases(spec, length=(*every[:3], 2, 1, 0), seg=kinds, dtype=(F32, F64, BF16), state=("random", "none"),
                  batch=(3, 1))  # fmt: skip
    table.append(("extend", check_extend, some))
    if spec.step is not None:
        steps = _cases(spec, length=short, dtype=(F32, F64, BF16), state=C.STATES, batch=(3, 1), decay=C.DECAYS)
        table.append(("step", check_step, steps))
    rows = _cases(spec, length=(Q + 1, 2), dtype=(F32, F64), seg=("mixed", "none"), decay=C.DECAYS)
    table.append(("rows", check_rows, rows))
    if spec.matrix is not None:
        square = _cases(spec, length=short, dtype=(F64, F32), seg=kinds,
                        decay=C.DECAYS)  # fmt: skip
        # A variant may be linear in its value and yet have no matrix of the op's layout; its cases module says so.
        has = getattr(spec.load_cases(), "MATRIX_VARIANTS", variants)
        table.append(("matrix", check_matrix, [replace(c, state="none") for c in square if c.variant in has]))
    if spec.summary is not None and spec.carry is not None:
        shards = _cases(spec, length=(Q + 1, 3 * Q + 5, 2), dtype=(F32, F64), seg=kinds,
                        state=("random", "none"), decay=C.DECAYS)  # fmt: skip
        table.append(("shards", check_shards, shards))
    if algorithms(spec):
        table.append(("algorithms", check_algorithms, _cases(spec, length=every, dtype=(F32, F64), seg=("none",),
                                                             state=C.STATES, decay=C.DECAYS)))  # fmt: skip
    causal = _cases(spec, length=(Q + 2, 2), dtype=(F32, F64), seg=("none", "mixed"))
    table.append(("causal", check_causal, causal))
    small = _cases(spec, length=(4,), dtype=(F64,), seg=("none", "mixed"), batch=(2,), decay=("mixed", "fast"))
    table.append(("gradcheck", check_gradcheck, small))
    twice = _cases(spec, length=(Q + 1, 5), dtype=(F32, F64), seg=("mixed", "none"), state=("random", "none"))
    table.append(("second derivatives", check_second_derivatives, twice))
    compiled = [Case(v, Q + 1, 2, seg=s) for v, s in zip(variants, itertools.cycle(("mixed", "none")))]
    compiled.append(Case(variants[0], Q + 1, 2, seg="mixed", dtype=F64))  # not by a kernel
    table.append(("compile", check_compile, compiled))
    # Only kernels are registered operators; where the reference serves, there is nothing to check.
    registered = [Case(v, 5, 2, seg=s) for v, s in zip(variants, itertools.cycle(("none", "mixed")))]
    registered = [case for case in registered if serving(draw(spec, case, device=device))[0] != "reference"]
    table.append(("registration", check_registration, registered))

    def bind(check, case) -> Callable[[], None]:
        def run() -> None:
            with poisoned_empty():
                check(spec, case, device)

        return run

    return [Law(f"{name}[{case}]", bind(check, case)) for name, check, chosen in table for case in chosen]


def check_op(spec: OpSpec, *, device: str = "cpu") -> int:
    """Check every law of an op; raises LawError at the first that does not hold. Returns how many were checked."""
    laws = op_laws(spec, device=device)
    for law in laws:
        law.check()
    return len(laws)
