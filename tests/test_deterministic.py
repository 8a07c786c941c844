"""statewise.deterministic: the same bits for a token however it is computed; ordinary mode does not promise that."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import statewise
from statewise import Segments, ops, state
from statewise.models.language import LanguageModel
from statewise.ops._deterministic import NotDeterministic, active
from statewise.testing import assert_no_worse

V, D, B, L = 32, 48, 3, 37
MAMBA2 = {"name": "mamba2", "d_state": 8, "head_dim": 8}
KINDS = {
    "mamba": {"name": "mamba", "d_state": 4},
    "mamba2": MAMBA2,
    "s4": [{"name": "s4d", "d_state": 8}, {"name": "s4", "d_state": 8}],
    "s5": {"name": "s5", "d_state": 8},
    "attention": {"name": "attention", "n_heads": 2},
    "hybrid": [MAMBA2, {"name": "attention", "n_heads": 4, "n_kv_heads": 2}],
    "window": [{"name": "mamba", "d_state": 4}, {"name": "attention", "n_heads": 2, "window": 5}],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(kind: str, dtype: torch.dtype = torch.float32, width: int = D) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(V, width, 2, mixer=KINDS[kind], d_intermediate=64, tie_embeddings=False).eval().to(dtype)


def tokens(batch: int = B, length: int = L) -> torch.Tensor:
    return torch.randint(0, V, (batch, length))


def same(got, want) -> bool:
    return all(torch.equal(g, w) for (_, g), (_, w) in zip(state.leaves(got), state.leaves(want), strict=True))


def in_chunks(model, x, cuts, start):
    ys = []
    for lo, hi in zip([0, *cuts], [*cuts, x.shape[1]]):
        y, start = model.extend(x[:, lo:hi], start)
        ys.append(y)
    return torch.cat(ys, 1), start


def by_steps(model, x, start):
    ys = []
    for t in range(x.shape[1]):
        y, start = model.step(x[:, t], start)
        ys.append(y)
    return torch.stack(ys, 1), start


def random_cuts(length: int, count: int) -> list[int]:
    return sorted(torch.randint(0, length + 1, (count,)).tolist())


def differs(model, x) -> list[str]:
    """Which of the promises about one row do not hold."""
    length = x.shape[1]
    whole, end = model.extend(x, model.init_state(len(x)))
    found = []

    def check(what, got, want):
        if not same(got, want):
            found.append(what)

    check("forward", model(x), whole)
    check("steps", by_steps(model, x, model.init_state(len(x))), (whole, end))
    check("buffer", by_steps(model, x, model.init_state(len(x), capacity=length))[0], whole)
    for _ in range(4):
        check("chunks", in_chunks(model, x, random_cuts(length, 4), model.init_state(len(x))), (whole, end))
    for rows in ([0], [2, 0], [1, 1, 0, 2, 2]):
        check("batch", model(x[rows]), whole[rows])
    short = [length, length - 5, 1]
    for side in ("left", "right"):
        seg = Segments.from_lengths(short, length + 9, side=side)
        padded = tokens(len(x), length + 9)
        padded[seg.valid] = torch.cat([x[b, :n] for b, n in enumerate(short)])
        check(f"{side} padding", model(padded, seg)[seg.valid], torch.cat([whole[b, :n] for b, n in enumerate(short)]))
    seg = Segments.pack([[length, 8, length - 3]])
    packed = torch.cat([x[0], x[1, :8], x[2, :-3]])[None]
    check("packed", model(packed, seg)[0], torch.cat([whole[0], whole[1, :8], whole[2, :-3]]))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_token_has_the_same_bits_however_it_is_computed(kind, dtype):
    model, x = build(kind, DTYPES[dtype]), tokens()
    with statewise.deterministic():
        assert differs(model, x) == []


@pytest.mark.usefixtures("split_small")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ordinary_mode_does_not_promise_it(kind):
    assert "steps" in differs(build(kind), tokens())


def outcome(model, x):
    logits = model(x)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    return logits.detach(), loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "s4", "s5", "hybrid"])
def test_gradients_from_run_to_run_and_for_any_number_of_threads(kind, threads):
    # Wide enough that every kernel splits its work.
    model, x = build(kind, width=128), tokens(2, 300)
    with statewise.deterministic():
        first = outcome(model, x)
        assert same(outcome(model, x), first), "a second run"
        for count in (2, 3):
            threads(count)
            assert same(outcome(model, x), first), f"{count} threads"
        threads(1)


@pytest.mark.usefixtures("split_small")
def test_ordinary_mode_depends_on_threads(threads):
    model, x = build("mamba", width=128), tokens(2, 300)
    first = outcome(model, x)
    threads(2)
    assert not same(outcome(model, x), first)


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same_function(kind):
    model, x = build(kind), tokens()
    wide = LanguageModel(**model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    with statewise.deterministic():
        got = outcome(model, x)
    names = ["logits", "loss", *(name for name, _ in model.named_parameters())]
    truth = outcome(wide, x)
    for name, g, p, t in zip(names, got, outcome(model, x), truth, strict=True):
        # Sums in one long chain round more often than those of a library.
        assert_no_worse(g, p, t, 8, name)


def test_elementwise_kernels_of_torch_treat_remainders_apart():
    x = torch.rand(3, 1001, 7) + 0.1
    uneven = []
    for function in (F.silu, F.softplus, torch.sigmoid, torch.exp, torch.tanh, torch.rsqrt, F.gelu):
        y = function(x)
        if not all(torch.equal(function(x[1, t]), y[1, t]) for t in range(0, 1001, 13)):
            uneven.append(function)
        with statewise.deterministic():
            y = function(x)
            assert all(torch.equal(function(x[1, t]), y[1, t]) for t in range(0, 1001, 13))
    assert uneven, "if none is uneven any more, the pieces of fixed size can go"


def test_products_and_sums_in_a_fixed_order():
    x, w = torch.randn(130, 1100), torch.randn(70, 1100)
    with statewise.deterministic():
        y, total = F.linear(x, w), x.sum(1)
        for rows in ([0], [129], [5, 6, 7, 8, 9]):
            assert torch.equal(F.linear(x[rows], w), y[rows])
            assert torch.equal(x[rows].sum(1), total[rows])
        assert torch.equal(F.linear(x.t().contiguous().t(), w.t().contiguous().t()), y), "strides"
        assert torch.equal(torch.einsum("rk,ck->rc", x, w), y), "another name"
        assert torch.equal(x.mean(1), total / 1100)
        with torch.inference_mode():
            assert torch.equal(F.linear(x, w), y)
    truth = x.double() @ w.double().t()
    assert_no_worse(y, x @ w.t(), truth, 4, "product")
    assert_no_worse(total, x.sum(1), x.double().sum(1), 4, "sum")


def test_a_switch_and_a_context():
    assert not active()
    with statewise.deterministic():
        assert active()
        with statewise.deterministic(False):
            assert not active()
        assert active()
    assert not active()
    statewise.deterministic()
    try:
        assert active()
        seen = []
        other = threading.Thread(target=lambda: seen.append(active()))
        other.start()
        other.join()
        assert seen == [False], "the switch belongs to a thread"
    finally:
        statewise.deterministic(False)
    assert not active()
    with pytest.raises(KeyError), statewise.deterministic():
        raise KeyError
    assert not active()


def test_what_cannot_be_had_says_why():
    x = torch.randn(2, 9, 4)
    with statewise.deterministic():
        with pytest.raises(NotDeterministic, match="products and sums are made in float32"):
            x.double() @ torch.randn(4, 4, dtype=torch.float64)
        with pytest.raises(NotDeterministic, match="_fft_r2c"):
            torch.fft.rfft(x)
        with pytest.raises(NotDeterministic, match="no form with a fixed order"):
            nn.Conv1d(9, 9, 2)(x)
        with pytest.raises(ops.BackendError, match="float32"):
            ops.linear_scan(x.double(), x.double())
        with pytest.raises(ops.BackendError, match="order of its additions depends on shapes"):
            ops.linear_scan(x, x, backend="reference")
        with pytest.raises(ops.BackendError, match="'fft' adds up"):
            ops.diagonal_ssm(x, -torch.rand(4, 2), torch.rand(4, 2), torch.rand(4, 2), algorithm="fft")
        with pytest.raises(NotDeterministic, match="on meta"):
            torch.empty(2, device="meta") + 1


@torch.no_grad()
def test_compiled_programs_are_left():
    # A program made before knows nothing of the order; inside, the model runs as it does without one.
    torch._dynamo.reset()
    model, x = build("mamba2"), tokens()
    fast = torch.compile(model, backend="aot_eager")
    fast(x)
    with statewise.deterministic():
        assert torch.equal(fast(x), model(x))
        assert torch.equal(fast(x[:1]), model(x)[:1])
    torch._dynamo.reset()


def test_training_inside():
    def train():
        model = build("hybrid")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(3):
            torch.manual_seed(step)
            x = tokens()
            loss = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return tuple(model.state_dict().values())

    with statewise.deterministic():
        assert same(train(), train())


def test_its_operators_are_what_they_claim():
    a, b = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 7, 3, requires_grad=True)
    operators = torch.ops.statewise
    torch.library.opcheck(operators.fixed_product.default, (a, b.detach(), True))
    torch.library.opcheck(operators.fixed_sums.default, (torch.randn(4, 9),))
    numbers = [torch.randn(4, 3, dtype=torch.complex64) for _ in range(3)]
    marks = Segments.pack([[3, 2], [4]]).marks
    start = torch.randn(2, 4, 3, dtype=torch.complex64)
    torch.library.opcheck(operators.diagonal_ssm_recurrent.default, (torch.randn(2, 5, 4), *numbers, start, marks))
    x, dt, rate = torch.randn(2, 5, 2, 4, requires_grad=True), torch.rand(2, 5, 2), -torch.rand(2)
    into, out, state_in = torch.randn(2, 5, 1, 3), torch.randn(2, 5, 1, 3), torch.randn(2, 2, 4, 3)
    for keep in (False, True):
        inputs = (x, dt, rate, into, out, torch.randn(2, 4), state_in, marks, 4, keep)
        torch.library.opcheck(operators.ssd_recurrent.default, inputs)
