"""torch.compile of whole language models: no graph break, one program for all lengths, the numbers of eager mode."""

from __future__ import annotations

import shutil
from itertools import product

import pytest
import torch
from torch import nn

from statewise import Segments, state
from statewise.models.language import LanguageModel
from statewise.testing import assert_no_worse
from statewise.testing.tolerance import disturbed

V, D, B, L = 32, 16, 2, 13
MAMBA2 = {"name": "mamba2", "d_state": 8, "head_dim": 8}
# Compiling is dear, so mixers that do not disturb each other share a model.
KINDS = {
    "ssm": [{"name": "s4d", "d_state": 8}, {"name": "s5", "d_state": 8}],
    "hybrid": [MAMBA2, {"name": "attention", "n_heads": 2, "n_kv_heads": 1}],
    "window": [{"name": "mamba", "d_state": 4}, {"name": "attention", "n_heads": 2, "window": 5}],
}
# Without Segments: test_model_laws.py. A program sees documents as positions, and padding as one more tensor, if any.
SEGMENTS = {"packed": Segments.pack([[3, 5, 5], [13]]), "left": Segments.from_lengths([9, 13], L, side="left")}
# Compiled code may add up in another order than eager code, which is held to the same factor as a kernel.
FACTOR = 4


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Its operator is wired as that of S4D, so one test is enough.
S4 = {"name": "s4", "d_state": 4}


def build(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(V, D, 2, mixer=KINDS.get(kind, S4), d_intermediate=8).eval()


def tokens(length: int = L) -> torch.Tensor:
    return torch.randint(0, V, (B, length))


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


def hold(got, run, model: nn.Module, *args) -> None:
    """`got` is what `run(model, *args)` gives, by the tolerance rule."""
    wide_args = [state.to(a, torch.float64) if isinstance(a, tuple) else a for a in args]
    runs = got, run(model, *args), run(wide(model), *wide_args), run(wide(model, disturb=True), *wide_args)
    for (name, g), (_, p), (_, t), (_, r) in zip(*map(state.leaves, runs), strict=True):
        if g.is_floating_point() or g.is_complex():
            assert_no_worse(g, p, t, FACTOR, name, rounded=r)
        else:
            assert torch.equal(g, p), name


def wide(model: LanguageModel, disturb: bool = False) -> LanguageModel:
    """The model in float64, with each weight off by one rounding of float32 if asked for."""
    copy = LanguageModel(**model.config).double().eval()
    generator = torch.Generator().manual_seed(0)
    weights = {name: t.double() for name, t in model.state_dict().items()}
    copy.load_state_dict({name: disturbed(t, generator) if disturb else t for name, t in weights.items()})
    return copy


def _real(y, seg):
    """Models promise nothing about their outputs at padding."""
    return y if seg is None or seg.valid is None else y[seg.valid]


def outputs(model, x, seg=None):
    return _real(model(x, seg), seg)


def with_gradients(model, x, seg):
    y = outputs(model, x, seg)
    return y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))


@pytest.mark.parametrize(("kind", "seg"), [*product(KINDS, SEGMENTS), ("s4", "packed")])
def test_forward_and_backward(kind, seg):
    model, x = build(kind), tokens()
    y = _real(compiled(model)(x, SEGMENTS[seg]), SEGMENTS[seg])
    got = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    hold((y.detach(), *got), with_gradients, model, x, SEGMENTS[seg])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_extend_and_step_from_a_state(kind):
    model, x = build(kind), tokens()
    extend, step = compiled(model.extend), compiled(model.step)
    first, kept = extend(x[:, :6], model.init_state(B))
    packed = Segments.pack([[3, 4], [7]])
    second, kept = extend(x[:, 6:], kept, packed)
    third, kept = step(x[:, 0], kept)

    def run(model, start):
        y1, now = model.extend(x[:, :6], start)
        y2, now = model.extend(x[:, 6:], now, packed)
        y3, now = model.step(x[:, 0], now)
        return y1, y2, y3, now

    hold((first, second, third, kept), run, model, model.init_state(B))


def programs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("seg", ["none", "packed, right"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_program_for_all_lengths(kind, seg):
    # Lengths on both sides of the window, of the tiles of the kernels and of the chunks.
    model = build(kind)
    run = compiled(model, dynamic=True)
    made = []
    for length in (7, 3, 65, 130):
        pack = None if seg == "none" else Segments.pack([[1, length - 2], [length]])
        x = tokens(length)
        hold(_real(run(x, pack), pack), outputs, model, x, pack)
        made.append(programs())
    assert made == made[:1] * len(made), "a new length made a new program"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_makes_one_program(kind):
    # With a capacity no state changes its shape. The first step sees a state from `init_state`, later ones its own.
    model, x = build(kind), tokens()
    step, now, made, ys = compiled(model.step), model.init_state(B, capacity=L), [], []
    for t in range(L):
        y, now = step(x[:, t], now)
        ys.append(y)
        made.append(programs())
    hold(torch.stack(ys, 1), outputs, model, x)
    assert made[1] == made[-1], "a step made a new program"


def test_a_graph_break_would_be_an_error():
    class Breaks(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(Breaks())(torch.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hybrid", "window"])
def test_inductor(kind):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler: torch.compile's default backend cannot run")
    model, x = build(kind), tokens()
    fast = compiled(model, backend="inductor")
    packed = SEGMENTS["packed"]
    y = fast(x, packed)
    got = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    hold((y.detach(), *got), with_gradients, model, x, packed)


def test_the_operator_of_diagonal_ssm_is_what_it_claims():
    seg = SEGMENTS["left"]
    numbers = [torch.randn(4, 3, dtype=torch.complex64) for _ in range(2)]
    log_a = torch.complex(-torch.rand(4, 3), torch.randn(4, 3))
    for algorithm, packed in ((None, True), ("fft", False), ("recurrent", True)):
        where = (seg.position, seg.valid) if packed else (None, None)
        u = torch.randn(2, L, 4, requires_grad=True)
        start = torch.randn(2, 4, 3, dtype=torch.complex64)
        inputs = (u, log_a, *numbers, torch.randn(4), start, *where, True, algorithm)
        torch.library.opcheck(torch.ops.statewise.diagonal_ssm.default, inputs)
