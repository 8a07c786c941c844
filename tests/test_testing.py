"""The laws themselves: they hold for a correct op, and they catch each way of getting one wrong."""

from __future__ import annotations

from dataclasses import replace

import numba
import numpy as np
import pytest
import torch

from statewise.ops import OpSpec, Summary
from statewise.testing import LawError, assert_agree, assert_no_worse, check_op, op_laws, poisoned_empty
from statewise.testing.cases import generator_for, pairwise, segments

# ---- a small correct op: h_t = a_t h_{t-1} + x_t, y_t = c h_t --------------------------------------------------------

VARIANTS = ("real", "complex", "shared")
FACTOR = 4.0


def sample(variant, batch, length, *, dtype, decay, generator):
    low, high = {"slow": (0.99, 1.0), "mixed": (0.3, 1.0), "fast": (1e-3, 0.2)}[decay]
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    a = low + (high - low) * torch.rand(batch, 1 if variant == "shared" else length, 2, generator=generator)
    x = torch.randn(batch, length, 2, generator=generator)
    c = torch.randn(2, generator=generator)
    if variant == "complex":
        a = a * torch.exp(1j * torch.rand(a.shape, generator=generator))
        wide = wide.to_complex()
    return {"x": x.to(dtype), "a": a.to(wide), "c": c.to(dtype)}


def scan(x, a, c, state=None, seg=None, backend=None):
    B, L, D = x.shape
    wide = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    wide = torch.promote_types(wide, a.dtype)
    h = torch.zeros(B, D, dtype=wide) if state is None else state
    a, u = a.expand(B, -1, D) if a.shape[1] == L else a.expand(B, L, D), x.to(wide)
    if seg is not None:
        hidden = (seg.marks == 2)[..., None]
        u, a = u.masked_fill(hidden, 0), a.masked_fill(hidden, 1)
        a = a.masked_fill(seg.resets[..., None], 0)
    ys = []
    for t in range(L):
        h = a[:, t] * h + u[:, t]
        ys.append(h)
    y = torch.stack(ys, 1) if ys else h.new_zeros(B, 0, D)
    y = ((y * c).real if y.is_complex() else y * c).to(x.dtype)
    return y if seg is None else seg.mask(y), h


def step(x, a, c, state=None):
    y, h = scan(x[:, None], a[:, None], c, state)
    return y[:, 0], h


def matrix(a, c, seg=None):
    """(B, L, L, D): row t, column s."""
    L = a.shape[1]
    a = a.masked_fill((seg.marks == 2)[..., None], 1) if seg is not None else a
    rows = []
    for t in range(L):
        row = []
        for s in range(L):
            entry = a[:, s + 1 : t + 1].prod(1) if s <= t else torch.zeros_like(a[:, 0])
            if seg is not None:
                apart = (seg.document[:, s] != seg.document[:, t]) | (seg.marks[:, s] == 2) | (seg.marks[:, t] == 2)
                entry = entry.masked_fill(apart[:, None], 0)
            row.append(entry * c)
        rows.append(torch.stack(row, 1))
    m = torch.stack(rows, 1)
    return m.real if m.is_complex() else m


def apply(m, x):
    return torch.einsum("btsd,bsd->btd", m, x.to(m.dtype)).to(x.dtype)


def summary(x, a, c, seg=None):
    L = x.shape[1]
    a, state = a.expand(-1, L, -1), scan(x, a, c, None, seg)[1]
    if seg is not None:
        a = a.masked_fill((seg.marks == 2)[..., None], 1).masked_fill(seg.resets[..., None], 0)
    return Summary(a.prod(1), state)


def carry(a, c, state, seg=None):
    if seg is not None:
        a = a.masked_fill((seg.marks == 2)[..., None], 1).masked_fill(seg.resets[..., None], 0)
    h = a.cumprod(1) * state[:, None] * c
    h = h.real if h.is_complex() else h
    return h if seg is None else seg.mask(h)


TOY = OpSpec(
    name="toy",
    run=scan,
    reference=scan,
    value="x",
    timed=("x", "a"),
    reasons=lambda **_: {"reference": None},
    cases=__name__,
    step=step,
    chunk=4,
)


class Linear:
    """The variants in which a has its own value at every time, so that a matrix and shards can be written down."""

    VARIANTS, FACTOR, sample = ("real", "complex"), FACTOR, staticmethod(sample)


class LinearSpec(OpSpec):
    def load_cases(self):
        return Linear


LINEAR = LinearSpec(
    **{f: getattr(TOY, f) for f in TOY.__dataclass_fields__}
    | {"matrix": matrix, "apply": apply, "summary": summary, "carry": carry}
)


@pytest.mark.parametrize("spec", [TOY, LINEAR], ids=["toy", "linear"])
def test_a_correct_op_passes(spec):
    assert check_op(spec) > 100


# ---- broken ops: each is caught, by the law that is there for it -----------------------------------------------------


def no_reset(x, a, c, state=None, seg=None, backend=None):
    return scan(x, a, c, state, None if seg is None else replace(seg, position=seg.position + 1))


def reset_drops_its_token(x, a, c, state=None, seg=None, backend=None):
    return scan(x if seg is None else x.masked_fill(seg.resets[..., None], 0), a, c, state, seg)


def leaks_nan(x, a, c, state=None, seg=None, backend=None):
    if seg is None or seg.valid is None:
        return scan(x, a, c, state, seg)
    return scan(x * seg.valid[..., None], a, c, state, replace(seg, valid=None))


def speaks_at_padding(x, a, c, state=None, seg=None, backend=None):
    y, h = scan(x, a, c, state, seg)
    return y if seg is None or seg.valid is None else y + (~seg.valid[..., None]) * 1e-3, h


def padding_decays(x, a, c, state=None, seg=None, backend=None):
    if seg is None or seg.valid is None:
        return scan(x, a, c, state, seg)
    hidden = ~seg.valid[..., None]
    y, h = scan(x.masked_fill(hidden, 0), a.masked_fill(hidden, 0.99), c, state, replace(seg, valid=None))
    return seg.mask(y), h


def ignores_state(x, a, c, state=None, seg=None, backend=None):
    return scan(x, a, c, None, seg)


def no_state_gradient(x, a, c, state=None, seg=None, backend=None):
    return scan(x, a, c, None if state is None else state.detach(), seg)


def no_gradient_through_the_state_out(x, a, c, state=None, seg=None, backend=None):
    y, h = scan(x, a, c, state, seg)
    return y, h.detach()


def wrong_gradient(x, a, c, state=None, seg=None, backend=None):
    return scan(x, a, c + 1e-3 * (c.detach() - c), state, seg)


def nan_gradient_at_padding(x, a, c, state=None, seg=None, backend=None):
    y, h = scan(x, a, c, state, seg)
    if seg is None or seg.valid is None:
        return y, h
    # The value is right everywhere, but the derivative of the branch that is not taken is 0 * NaN.
    return y + torch.where(seg.valid[..., None], 0 * x * x, 0), h


def looks_ahead(x, a, c, state=None, seg=None, backend=None):
    y, h = scan(x, a, c, state, seg)
    ahead = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)[:, : x.shape[1]]
    return y + 0.1 * (ahead if seg is None else seg.mask(ahead)), h


def mixes_rows(x, a, c, state=None, seg=None, backend=None):
    y, h = scan(x, a, c, state, seg)
    return y + 0.1 * torch.roll(y.detach(), 1, 0) * (torch.arange(len(y)) == 1)[:, None, None], h


def wants_contiguous(x, a, c, state=None, seg=None, backend=None):
    dense = torch.empty(x.shape, dtype=x.dtype).stride()
    return scan(torch.as_strided(x, x.shape, dense), a, c, state, seg)


def forgets_to_write(x, a, c, state=None, seg=None, backend=None):
    y, h = scan(x, a, c, state, seg)
    out = torch.empty_like(y)
    out[:, :16] = y[:, :16]
    return out, h


def state_in_half(x, a, c, state=None, seg=None, backend=None):
    if x.dtype != torch.bfloat16:
        return scan(x, a, c, state, seg)
    y, h = scan(x, a.to(x.dtype), c, None if state is None else state.to(x.dtype), seg)
    return y, h.to(a.dtype)


def sloppy_kernel(x, a, c, state=None, seg=None, backend=None):
    y, h = scan(x, a, c, state, seg)
    return (y * (1 + 1e-5), h) if x.dtype == torch.float32 else (y, h)


def wrong_dtype(x, a, c, state=None, seg=None, backend=None):
    y, h = scan(x, a, c, state, seg)
    return y.float() if y.dtype == torch.bfloat16 else y, h


def overwrites(x, a, c, state=None, seg=None, backend=None):
    y, h = scan(x, a, c, state, seg)
    x.detach().mul_(2)
    return y, h


def breaks_graph(x, a, c, state=None, seg=None, backend=None):
    torch._dynamo.graph_break()
    return scan(x, a, c, state, seg)


def no_operator(x, a, c, state=None, seg=None, backend=None):
    return scan(x, a, c, state, seg)


def stale_step(x, a, c, state=None):
    y, h = step(x, a, c, state)
    return (y, h) if state is None else (y, h + 1e-6 * state)


def wrong_when_serving(x, a, c, state=None):
    y, h = step(x, a, c, state)
    return y, h if torch.is_grad_enabled() else 0.5 * h


def matrix_without_resets(a, c, seg=None):
    return matrix(a, c, None if seg is None else replace(seg, position=seg.position + 1))


def summary_without_resets(x, a, c, seg=None):
    state = scan(x, a, c, None, seg)[1]
    return Summary(summary(x, a, c, None if seg is None else replace(seg, position=seg.position + 1)).transition, state)


def carry_of_the_wrong_time(a, c, state, seg=None):
    return carry(a, c, state, seg) / a[:, :1].abs()


RUNS = [
    ("definition", no_reset),
    ("definition", reset_drops_its_token),
    ("definition", leaks_nan),
    ("definition", speaks_at_padding),
    ("definition", padding_decays),
    ("definition", ignores_state),
    ("extend", ignores_state),
    ("definition", no_state_gradient),
    ("extend", no_state_gradient),
    ("definition", no_gradient_through_the_state_out),
    ("definition", wrong_gradient),
    ("definition", nan_gradient_at_padding),
    ("causal", looks_ahead),
    ("rows", mixes_rows),
    ("definition", wants_contiguous),
    ("definition", forgets_to_write),
    ("definition", state_in_half),
    ("definition", sloppy_kernel),
    ("definition", wrong_dtype),
    ("definition", overwrites),
    ("compile", breaks_graph),
    ("registration", no_operator),
]


def check_kind(spec, kind):
    laws = [law for law in op_laws(spec) if law.name.startswith(f"{kind}[")]
    assert laws
    for law in laws:
        law.check()


@pytest.mark.parametrize(("kind", "broken"), RUNS, ids=lambda v: getattr(v, "__name__", v))
def test_broken_run_is_caught(kind, broken):
    reasons = (lambda **_: {"numba": None, "reference": None}) if kind == "registration" else TOY.reasons
    wanted = torch._dynamo.exc.Unsupported if kind == "compile" else LawError
    with pytest.raises(wanted):
        check_kind(replace(TOY, run=broken, reasons=reasons), kind)


@pytest.mark.parametrize("broken", [no_reset, leaks_nan, padding_decays], ids=lambda f: f.__name__)
def test_a_reference_that_is_wrong_on_segments_is_caught(broken):
    with pytest.raises(LawError):
        check_kind(replace(TOY, run=broken, reference=broken), "definition")


def test_a_reference_with_wrong_derivatives_is_caught():
    def reference(x, a, c, state=None, seg=None):
        return scan(x, a, 2 * c - c.detach(), state, seg)

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        check_kind(replace(TOY, reference=reference), "gradcheck")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("step", {"step": stale_step}),
        ("step", {"step": wrong_when_serving}),
        ("matrix", {"matrix": matrix_without_resets}),
        ("shards", {"summary": summary_without_resets}),
        ("shards", {"carry": carry_of_the_wrong_time}),
    ],
)
def test_a_broken_view_is_caught(kind, change):
    with pytest.raises(LawError):
        check_kind(replace(LINEAR, **change), kind)


# ---- the tools -------------------------------------------------------------------------------------------------------


def test_pairwise_covers_every_pair():
    factors = {"a": "xyz", "b": (1, 2, 3, 4), "c": (True, False), "d": "pq"}
    rows = pairwise(factors)
    for m in factors:
        for n in factors:
            if m != n:
                assert {(r[m], r[n]) for r in rows} == {(i, j) for i in factors[m] for j in factors[n]}
    assert len(rows) < 20
    assert rows == pairwise(factors)


def test_tolerance_rule():
    truth = torch.tensor([1.0, -3.0], dtype=torch.float64)
    plain = truth.float() * (1 + 1e-5)
    assert_no_worse(truth.float() * (1 + 3e-5), plain, truth, 4, "x")
    with pytest.raises(LawError, match="at most 4 times"):
        assert_no_worse(truth.float() * (1 + 6e-5), plain, truth, 4, "x")
    with pytest.raises(LawError, match="not finite"):
        assert_no_worse(torch.tensor([1.0, torch.nan]), plain, truth, 4, "x")
    with pytest.raises(LawError, match="shape"):
        assert_no_worse(torch.zeros(1), plain, truth, 4, "x")
    with pytest.raises(LawError, match="dtype"):
        assert_no_worse(truth, plain, truth, 4, "x")
    with pytest.raises(LawError, match="differs"):
        assert_agree(truth * (1 + 1e-10), truth, "x", 8)
    with pytest.raises(LawError):
        assert_no_worse(torch.zeros(2) + 1e-30, torch.zeros(2), torch.zeros(2).double(), 4, "x")


def test_poison():
    with poisoned_empty():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
        assert torch.zeros(1).new_empty(2).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_kernels_can_be_compiled_while_memory_is_poisoned():
    @numba.njit
    def count(n):
        return np.zeros(n).size + np.empty(n).size

    with poisoned_empty():
        assert count(3) == 6


@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_every_kind_of_segments_at_every_length(length):
    from statewise.testing.cases import SEGMENTS

    for kind in SEGMENTS:
        seg = segments(kind, 3, length, 4, generator_for(kind, length))
        assert (seg is None) if kind == "none" else seg.shape == (3, length)
