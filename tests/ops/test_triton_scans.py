"""The Triton kernels of linear_scan and selective_scan in Triton's interpreter on CPU: laws, and what these leave out.

TRITON_INTERPRET=1 pytest -m triton. On a CUDA device tests/test_op_laws.py runs every law on compiled kernels.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from statewise import Segments
from statewise.ops import OPS, BackendError, _backend, linear_scan, selective_scan, selective_scan_step
from statewise.ops._backend import interpreted, triton_reason
from statewise.testing import assert_agree, assert_no_worse, op_laws, poisoned_empty

kernels = [
    pytest.mark.triton,
    pytest.mark.skipif(not interpreted(), reason="the Triton kernels without a GPU: TRITON_INTERPRET=1 is not set"),
]

# How many cases of each law run, evenly chosen. The interpreter takes about a second for the gradients of one call, so
# the full lists, which run on a GPU, would take half an hour. Length and seed of a case do not depend on the choice.
CASES = {
    "linear_scan": {"definition": 16, "extend": 3, "step": 3, "rows": 2, "matrix": 2, "shards": 2, "algorithms": 1,
                    "causal": 2, "gradcheck": 1, "second derivatives": 2, "compile": 3, "registration": 5},
    "selective_scan": {"definition": 16, "extend": 3, "step": 3, "rows": 2, "matrix": 2, "shards": 2, "algorithms": 1,
                       "causal": 2, "gradcheck": 1, "second derivatives": 2, "compile": 2, "registration": 4},
}  # fmt: skip
# Tile and chunk of the kernels under the interpreter.
CHUNK = 8


def _first(reasons):
    """The same reasons with Triton preferred, so that every way in which a law calls the op comes to the kernels."""

    def ordered(*args, **inputs):
        found = reasons(*args, **inputs)
        return {"triton": found["triton"], "numba": "not what is tested here", "reference": found["reference"]}

    return ordered


def _chosen():
    for name, counts in CASES.items():
        spec = replace(OPS[name], reasons=_first(OPS[name].reasons), chunk=CHUNK)
        laws = op_laws(spec)
        kinds = {law.name.split("[")[0] for law in laws}
        # Only kernels that serve are registered operators with a law of their own.
        assert kinds | {"registration"} == set(counts), f"{name}: {kinds} are not the laws with a number of cases"
        for kind, count in counts.items():
            # Kernels are float32; in float64 the reference serves, which other tests hold to the laws.
            those = [law for law in laws if law.name.startswith(f"{kind}[")]
            those = [law for law in those if "float64" not in law.name] or those
            picked = min(count, len(those))
            for i in range(picked):
                law = those[i * len(those) // picked]
                yield pytest.param(name, law, id=f"{name}-{law.name}")


@pytest.mark.parametrize(("name", "law"), list(_chosen()))
class TestLaws:
    pytestmark = kernels

    def test_law(self, name, law, monkeypatch):
        module = sys.modules[f"statewise.ops.{name}"]
        monkeypatch.setattr(module, "reasons", _first(module.reasons))
        law.check()


def _draw(generator, dtype, *shape):
    return torch.randn(shape, generator=generator, dtype=dtype if dtype.is_complex else torch.float64).to(dtype)


def _wide(kind, t):
    """`kind` for real tensors, its complex partner for complex ones."""
    return t.to(kind.to_complex()) if t.is_complex() else t.to(kind)


def _compare(run, tensors: dict, factor: float, what: str) -> dict:
    """`run(tensors, backend)` on Triton against the reference in float64, with all gradients."""

    def outcome(change, backend):
        leaves = {k: change(t).detach().requires_grad_() for k, t in tensors.items()}
        found = dict(enumerate(run(leaves, backend)))
        generator = torch.Generator().manual_seed(1)
        cotangents = [_draw(generator, torch.complex64 if t.is_complex() else torch.bfloat16, *t.shape).to(t.dtype)
                      for t in found.values()]  # fmt: skip
        grads = torch.autograd.grad(list(found.values()), list(leaves.values()), cotangents)
        return found | dict(zip(leaves, grads))

    with poisoned_empty():
        got = outcome(lambda t: t, "triton")
    plain = outcome(lambda t: _wide(torch.float32, t), "reference")
    truth = outcome(lambda t: _wide(torch.float64, t), "reference")
    for name, t in truth.items():
        assert_no_worse(got[name], plain[name].to(got[name].dtype), t, factor, f"{what}: {name}")
    return got


DECAYS = {
    "full": (2, 11, 3), "constant in time": (2, 1, 3), "one row": (1, 11, 3), "one number a channel": (1, 1, 3),
    "shared by all": (2, 11, 1), "one number": (1, 1, 1),
}  # fmt: skip


class TestLinearScan:
    pytestmark = kernels

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("shape", DECAYS)
    def test_decays_of_every_shape(self, shape, shared, reverse, monkeypatch):
        """Shared by eight channels: with a block of channels for each decay, and without."""
        from statewise.ops.linear_scan import triton as T

        monkeypatch.setattr(T, "_SHARED", 8 if shared else 9)
        g = torch.Generator().manual_seed(0)
        tensors = {
            "a": _draw(g, torch.float32, *DECAYS[shape], 1).sigmoid(), "x": _draw(g, torch.float32, 2, 11, 3, 8),
            "state": _draw(g, torch.float32, 2, 3, 8),
        }  # fmt: skip
        _compare(lambda t, b: linear_scan(**t, reverse=reverse, backend=b), tensors, 3.0, shape)

    @pytest.mark.parametrize("complex_", [False, True])
    def test_reverse_with_documents(self, complex_):
        g = torch.Generator().manual_seed(0)
        dtype = torch.complex64 if complex_ else torch.float32
        a, x = 0.7 * _draw(g, dtype, 3, 21, 6), _draw(g, dtype, 3, 21, 6)
        valid = torch.rand(3, 21, generator=g) < 0.8
        seg = Segments(Segments.pack([[3, 9, 9], [21], [8, 8, 5]]).position, valid)
        x = x.masked_fill(~valid[..., None], float("nan"))

        def run(t, backend):
            return linear_scan(**t, seg=seg, reverse=True, backend=backend)

        _compare(run, {"a": a, "x": x}, 3.0, "reverse")

    def test_real_decay_of_complex_numbers(self):
        g = torch.Generator().manual_seed(0)
        tensors = {"a": _draw(g, torch.float32, 17, 5).sigmoid(), "x": _draw(g, torch.complex64, 2, 17, 5)}
        _compare(lambda t, b: linear_scan(**t, backend=b), tensors, 3.0, "real decay")

    @pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
    def test_nothing_passes_the_start_of_a_document(self):
        """Neither an overflow in the document before, nor a state that is not a number."""
        a, x = torch.full((1, 20, 2), 1e30), torch.ones(1, 20, 2)
        seg = Segments.pack([[7, 13]])
        a[:, 8:] = 0.5
        h, last = linear_scan(a, x, seg=seg, state=torch.full((1, 2), float("nan")), backend="triton")
        assert not h[:, :7].isfinite().all()
        want, want_last = linear_scan(a[:, 7:], x[:, 7:], seg=Segments.pack([[13]]), backend="reference")
        assert_agree(h[:, 7:], want, "the second document", 13)
        assert_agree(last, want_last, "its last state", 13)

    def test_an_algorithm_is_the_reference_s(self):
        a = torch.rand(1, 3, 2)
        with pytest.raises(BackendError, match="is a form of the reference"):
            linear_scan(a, a, algorithm="recurrent", backend="triton")

    def test_stretches_change_rounding_only(self, monkeypatch):
        from statewise.ops.linear_scan import triton as T

        g = torch.Generator().manual_seed(0)
        a, x = _draw(g, torch.float32, 1, 61, 3).sigmoid(), _draw(g, torch.float32, 1, 61, 3)
        cut = linear_scan(a, x, backend="triton")
        monkeypatch.setattr(T, "stretches", lambda t, warps, chunks: chunks)
        whole = linear_scan(a, x, backend="triton")
        truth, plain = linear_scan(a.double(), x.double()), linear_scan(a, x, backend="reference")
        for got in (cut, whole):
            for u, v, w in zip(got, plain, truth):
                assert_no_worse(u, v, w, 3.0, "stretches")


def _selective(generator, B, L, D, N, G, dtype=torch.float32):
    return {
        "x": _draw(generator, dtype, B, L, D), "dt": _draw(generator, dtype, B, L, D),
        "A": -_draw(generator, dtype, D, N).abs() - 0.5, "B": _draw(generator, dtype, B, L, G, N),
        "C": _draw(generator, dtype, B, L, G, N), "D": _draw(generator, dtype, D),
        "z": _draw(generator, dtype, B, L, D), "dt_bias": _draw(generator, dtype, D),
        "state": _draw(generator, dtype, B, D, N),
    }  # fmt: skip


class TestSelectiveScan:
    pytestmark = kernels

    @pytest.mark.parametrize("partials", [1, 2, 32])
    @pytest.mark.parametrize("split", [False, True])
    def test_blocks_of_channels_that_share_a_partial_sum(self, partials, split, monkeypatch):
        """Three blocks in a group, the last one not full; limits that cut on both sides; a width N that is padded."""
        from statewise.ops.selective_scan import triton as T

        monkeypatch.setattr(T, "PARTIALS", partials)
        monkeypatch.setattr(T, "config", lambda *_: {"BLOCK_D": 2, "num_warps": 1})
        monkeypatch.setattr(T, "stretches", lambda t, warps, chunks: 1 if split else chunks)
        tensors = _selective(torch.Generator().manual_seed(0), 1, 19, 10, 3, 2)
        seg = Segments(torch.arange(19)[None] - 11 * (torch.arange(19) >= 11) + 2 * (torch.arange(19) < 11))

        def run(t, backend):
            return selective_scan(**t, dt_softplus=True, dt_limit=(0.3, 1.1), seg=seg, backend=backend)

        _compare(run, tensors, 3.0, "limits")

    def test_the_same_call_gives_the_same_bits(self):
        tensors = _selective(torch.Generator().manual_seed(0), 2, 17, 6, 4, 1)

        def grads():
            leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
            y, state = selective_scan(**leaves, dt_softplus=True, backend="triton")
            return torch.autograd.grad(y.sum() + state.sum(), list(leaves.values()))

        assert all(torch.equal(u, v) for u, v in zip(grads(), grads()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("bare", [False, True])
    def test_step(self, dtype, bare):
        tensors = _selective(torch.Generator().manual_seed(0), 2, 1, 6, 3, 2, dtype)
        if bare:
            tensors = {k: v for k, v in tensors.items() if k not in ("D", "z", "dt_bias")}
        one = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in tensors.items()}
        before = one["state"].clone()

        def run(change, backend):
            given = {k: change(v) for k, v in one.items()}
            return selective_scan_step(**given, dt_softplus=not bare, backend=backend)

        with torch.no_grad(), poisoned_empty():
            got = run(lambda t: t, "triton")
        assert torch.equal(one["state"], before), "the step changed the state it was given"
        plain, truth = run(torch.Tensor.float, "reference"), run(torch.Tensor.double, "reference")
        for name, u, v, w in zip(("y", "state"), got, plain, truth):
            assert_no_worse(u, v.to(u.dtype), w, 3.0, name)
        assert got[1].dtype == torch.float32

    def test_nothing_passes_the_start_of_a_document(self):
        tensors = _selective(torch.Generator().manual_seed(0), 1, 20, 4, 3, 1)
        tensors["state"].fill_(float("nan"))
        y, state = selective_scan(**tensors, dt_softplus=True, seg=Segments.pack([[7, 13]]), backend="triton")
        assert y.isfinite().all()
        assert state.isfinite().all()

    def test_a_wide_state_says_why_not(self):
        wide = torch.zeros(1, 2, 300)
        found = OPS["selective_scan"].reasons(x=wide[..., :4], dt=wide[..., :4], A=torch.zeros(4, 300), B=wide, C=wide)
        assert "N = 256 at most, got N = 300" in str(found["triton"])


if interpreted():  # a kernel finds the functions it calls in its module only
    import triton
    import triton.language as tl

    from statewise.ops._triton import sigmoid, softplus

    @triton.jit
    def _softplus_and_sigmoid(x, y, s, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        value = tl.load(x + i)
        tl.store(y + i, softplus(value))
        tl.store(s + i, sigmoid(value))


class TestShared:
    pytestmark = kernels

    def test_softplus_and_sigmoid_keep_all_digits(self):
        x = torch.linspace(-10, 40, 1024)
        y, s = torch.empty_like(x), torch.empty_like(x)
        _softplus_and_sigmoid[(1,)](x, y, s, BLOCK=1024)
        for got, function in ((y, torch.nn.functional.softplus), (s, torch.sigmoid)):
            # Of each number on its own, small ones too: exp(x) passes a rounding of x on, ten times as large.
            truth = function(x.double())
            disturbed = function(x.double() * (1 + torch.finfo(torch.float32).eps))
            wrong = ((got - truth) / truth).abs()
            allowed = 4 * torch.finfo(torch.float32).eps + 2 * ((disturbed - truth) / truth).abs()
            assert (wrong <= allowed).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
    @pytest.mark.parametrize("reverse", [False, True])
    def test_join(self, dtype, reverse):
        from statewise.ops._triton import join

        g = torch.Generator().manual_seed(0)
        through, local, start = _draw(g, dtype, 5, 2, 7), _draw(g, dtype, 5, 2, 7), _draw(g, dtype, 2, 7)
        for first in (start, None):
            state, want = torch.zeros(2, 7, dtype=dtype) if first is None else first, {}
            for k in reversed(range(5)) if reverse else range(5):
                want[k] = state
                state = through[k] * state + local[k]
            got = join(through, local, first, reverse=reverse)
            assert_agree(got, torch.stack([want[k] for k in range(5)]), "join", 5)

    def test_launch_parameters(self):
        from statewise.ops._triton import MOST, config
        from statewise.ops.linear_scan import triton as linear
        from statewise.ops.selective_scan import triton as selective

        t = torch.zeros(1)
        for D in (1, 5, 64, 2048):
            for N in (1, 3, 16, 64, 128, 256):
                for op in ("selective_scan", "selective_scan_backward", "selective_scan_step"):
                    found = config(op, (9, 0), D, N)
                    assert found["BLOCK_D"].bit_count() == 1
                    assert found["BLOCK_D"] < 2 * D
                assert len(selective._alternatives("selective_scan", t, D, N)) <= MOST
            assert len(linear._alternatives("linear_scan", t, D)) <= MOST
        with pytest.raises(ValueError, match="no launch parameters"):
            config("nothing", (9, 0), 1, 1)

    def test_tuning_keeps_the_fastest_and_is_off_by_default(self, monkeypatch):
        from statewise.ops import _triton as T

        seen, candidates = [], [{"BLOCK_D": 1}, {"BLOCK_D": 2}, {"BLOCK_D": 4}]

        def run(parameters):
            seen.append(parameters["BLOCK_D"])
            return parameters["BLOCK_D"]

        assert T.tuned("key", candidates, run) == 1
        assert seen == [1]
        monkeypatch.setattr(T, "_AUTOTUNE", True)
        monkeypatch.setattr(T, "interpreted", lambda: False)
        monkeypatch.setattr(T, "_best", {})
        monkeypatch.setattr(T.torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(T.triton.testing, "do_bench", lambda f: abs(f() - 2))
        assert T.tuned("key", candidates, run) == 2
        assert T.tuned("key", candidates, run) == 2
        assert seen == [1, 1, 2, 4, 2, 2], "the second call of a key tries nothing"
        with pytest.raises(ValueError, match="want 1 to 8 of them, got 9"):
            T.tuned("key", candidates * 3, run)


# ---- compiled, though not run: the interpreter takes what the compiler refuses ---------------------------------------


@pytest.mark.skipif(interpreted(), reason="compiling Triton kernels: TRITON_INTERPRET is set")
class TestCompiled:
    @pytest.mark.parametrize("full", [False, True])
    def test_selective_scan(self, full, compiled):
        from statewise.ops.selective_scan import triton as T

        t = _selective(torch.Generator().manual_seed(0), 1, 256, 64, 16, 1, torch.bfloat16 if full else torch.float32)
        marks = torch.zeros(1, 256, dtype=torch.uint8) if full else None
        if not full:
            t |= {"D": None, "z": None, "dt_bias": None, "state": None}
        options = (True, 0.01, 2.0) if full else (False, -float("inf"), float("inf"))
        y, last, bounds = T.forward(*t.values(), marks, *options, True)
        T.backward(y, last, *t.values(), marks, bounds, *options)
        one = [v[:, 0] if v is not None and v.ndim > 2 else v for v in list(t.values())[:-1]]
        T.step(*one, *options, last)
        assert set(compiled) == {"_stretch_forward", "_forward", "_stretch_backward", "_backward", "_join", "_decode"}
        # The states of a channel lie in one lane: nothing is summed over lanes at a position.
        assert "shfl" not in compiled["_forward"]

    @pytest.mark.parametrize("full", [False, True])
    def test_linear_scan(self, full, compiled):
        from statewise.ops.linear_scan import triton as T

        dtype = torch.complex64 if full else torch.bfloat16
        a, x = torch.ones(1, 256, 1 if full else 64, dtype=dtype), torch.ones(1, 256, 64, dtype=dtype)
        marks = torch.zeros(1, 256, dtype=torch.uint8) if full else None
        h, last, bounds = T.forward(a, x, None, marks, full, True)
        T.backward(h, last, a, x, None, marks, bounds, full)
        assert set(compiled) == {"_forward", "_backward", "_join"}
        # The tokens of a tile lie in one lane: so does its scan.
        assert "shfl" not in compiled["_forward"]


# ---- what holds without the interpreter too -------------------------------------------------------------------------


def test_reasons(monkeypatch):
    monkeypatch.setattr(_backend, "_interpreted", False)
    assert triton_reason(torch.zeros(1)) == "Triton kernels run on CUDA tensors, got one on cpu"
    monkeypatch.setattr(_backend, "_interpreted", True)
    assert "compute in float32, got torch.float64" in str(triton_reason(None, torch.zeros(1, dtype=torch.float64)))
    monkeypatch.setattr(_backend, "_has_triton", False)
    assert triton_reason(torch.zeros(1)) == "triton is not installed: pip install statewise[gpu]"
    monkeypatch.setattr(_backend, "_has_triton", True)
    assert triton_reason(torch.zeros(1), None, torch.zeros(1, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("name", CASES)
def test_on_cpu_numba_comes_first(name):
    call = OPS[name].load_cases().sample("plain", 1, 4, dtype=torch.float32, decay="mixed", generator=torch.Generator())
    assert list(OPS[name].reasons(**call)) == ["numba", "triton", "reference"]
    assert OPS[name].reasons(**call)["numba"] is None
