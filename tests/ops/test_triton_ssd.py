"""The Triton kernels of ssd, short_conv and the norms in Triton's interpreter on CPU: laws, and what these leave out.

TRITON_INTERPRET=1 pytest -m triton. On a CUDA device tests/test_op_laws.py runs every law on compiled kernels.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from statewise.ops import OPS, gated_rms_norm, rms_norm, short_conv, ssd
from statewise.ops._backend import interpreted, triton_reason
from statewise.testing import assert_no_worse, op_laws, poisoned_empty

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not interpreted(), reason="the Triton kernels without a GPU: TRITON_INTERPRET=1 is not set"),
]

# How many cases of each law run, evenly chosen. The interpreter takes some 10 ms for each chunk of each head, so the
# full lists, which run on a GPU, would take an hour. Length and seed of a case do not depend on the choice.
CASES = {
    "ssd": {"definition": 16, "extend": 3, "step": 3, "rows": 1, "matrix": 2, "shards": 2, "algorithms": 1,
            "causal": 1, "gradcheck": 1, "second derivatives": 2,
            "compile": 2, "registration": 5},
    "short_conv": {"definition": 24, "extend": 4, "step": 3, "rows": 2, "causal": 1, "gradcheck": 1,
                   "second derivatives": 2, "compile": 2, "registration": 5},
}  # fmt: skip
# Chunks of the tests in every dtype, the least that the kernels take, so that short rows have several.
CHUNK = 16


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
                law, split = those[i * len(those) // picked], i % 2 == 0
                yield pytest.param(name, law, split, id=f"{name}-{law.name}{'-split' if split else ''}")


@pytest.fixture
def small(monkeypatch):
    """Chunks of 16 positions; with `split`, so many processors that time and heads are cut into parts."""

    def prepare(split: bool) -> None:
        from statewise.ops.ssd import triton as kernels

        monkeypatch.setattr(kernels, "CHUNK", CHUNK)
        if split:
            monkeypatch.setattr(kernels, "processors", lambda _: 16)

    return prepare


@pytest.mark.parametrize(("name", "law", "split"), list(_chosen()))
def test_law(name, law, split, small, monkeypatch):
    small(split)
    module = sys.modules[f"statewise.ops.{name}"]
    monkeypatch.setattr(module, "reasons", _first(module.reasons))
    law.check()


def _draw(generator, dtype, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _compare(run, tensors: dict, dtype, factor: float, what: str) -> None:
    """`run(tensors, backend)` on Triton against the reference in float64, with all gradients."""

    def outcome(kind, backend):
        leaves = {k: t.to(kind).detach().requires_grad_() for k, t in tensors.items()}
        found = dict(enumerate(run(leaves, backend)))
        generator = torch.Generator().manual_seed(1)
        cotangents = [_draw(generator, torch.bfloat16, *t.shape).to(t.dtype) for t in found.values()]
        grads = torch.autograd.grad(list(found.values()), list(leaves.values()), cotangents)
        return found | dict(zip(leaves, grads))

    with poisoned_empty():
        got = outcome(dtype, "triton")
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    plain, truth = outcome(wide, "reference"), outcome(torch.float64, "reference")
    for name, t in truth.items():
        assert_no_worse(got[name], plain[name].to(got[name].dtype), t, factor, f"{what}: {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_ssd_of_wide_heads_with_limits(dtype, softplus, small):
    """Two blocks of channels in a head, columns that fill no block, and a clamp that cuts on both sides."""
    small(split=True)
    B, L, H, P, G, N = 1, 20, 4, 70, 2, 20
    g = torch.Generator().manual_seed(0)
    tensors = {
        "x": _draw(g, dtype, B, L, H, P), "dt": _draw(g, dtype, B, L, H).abs(), "A": -_draw(g, dtype, H).abs() - 0.5,
        "B": _draw(g, dtype, B, L, G, N), "C": _draw(g, dtype, B, L, G, N), "D": _draw(g, dtype, H, P),
        "z": _draw(g, dtype, B, L, H, P), "dt_bias": _draw(g, dtype, H), "state": _draw(g, dtype, B, H, P, N),
    }  # fmt: skip

    def run(t, backend):
        return ssd(**t, dt_softplus=softplus, dt_limit=(0.5, 1.2), backend=backend)

    _compare(run, tensors, dtype, 3.0, "limits")


def test_ssd_keeps_digits_where_decay_is_fast(small):
    """Running sums of the log decay reach hundreds inside a chunk; their differences must not lose digits."""
    small(split=False)
    B, L, H, P, N = 1, 32, 2, 16, 16
    g = torch.Generator().manual_seed(0)
    tensors = {
        "x": _draw(g, torch.float32, B, L, H, P), "dt": _draw(g, torch.float32, B, L, H).abs(),
        "A": torch.tensor([-0.01, -40.0]), "B": _draw(g, torch.float32, B, L, 1, N),
        "C": _draw(g, torch.float32, B, L, 1, N),
    }  # fmt: skip
    # One step in three hardly decays: after the large ones, its decay is the difference of two large sums.
    tensors["dt"][:, ::3] *= 1e-3
    _compare(lambda t, backend: ssd(**t, backend=backend), tensors, torch.float32, 3.0, "fast")


def test_ssd_refuses_what_does_not_fit_registers():
    x, dt, A, b = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1), torch.zeros(1), torch.zeros(1, 2, 1, 300)
    assert "N = 256 at most, got N = 300" in str(OPS["ssd"].reasons(x=x, dt=dt, A=A, B=b, C=b)["triton"])


def test_float64_is_left_to_the_reference():
    assert "compute in float32, got torch.float64" in str(triton_reason(torch.zeros(1, dtype=torch.float64)))


@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("state", [True, False])
def test_short_conv_of_one_token(width, state):
    g = torch.Generator().manual_seed(0)
    x, w, b = _draw(g, torch.float32, 2, 1, 7), _draw(g, torch.float32, 7, width), _draw(g, torch.float32, 7)
    before = _draw(g, torch.float32, 2, width - 1, 7) if state else None
    with torch.no_grad(), poisoned_empty():
        y, s = short_conv(x, w, b, "silu", state=before, backend="triton")
    plain, s_plain = short_conv(x, w, b, "silu", state=before, backend="reference")
    wide = [None if t is None else t.double() for t in (x, w, b, before)]
    truth, _ = short_conv(*wide[:3], "silu", state=wide[3], backend="reference")
    assert_no_worse(y, plain, truth, 4.0, "y")
    assert torch.equal(s, s_plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((2, 3, 20), 1), ((5, 24), 3), ((1, 130), 2)])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("weight", [True, False])
def test_norm(shape, groups, gate, weight, dtype):
    g = torch.Generator().manual_seed(0)
    tensors = {"x": _draw(g, dtype, *shape)}
    if gate:
        tensors["z"] = _draw(g, dtype, *shape)
    if weight:
        tensors["weight"] = _draw(g, dtype, shape[-1])

    def run(t, backend):
        return ((gated_rms_norm if gate else rms_norm)(**t, groups=groups, backend=backend),)

    _compare(run, tensors, dtype, 3.0, "norm")


def test_norm_of_views_and_of_nothing():
    """A mixer's gate is a slice of a projection, so its rows are not dense."""
    g = torch.Generator().manual_seed(0)
    wide, w = _draw(g, torch.float32, 2, 3, 25), _draw(g, torch.float32, 10)
    x, z = wide[..., :10], wide[..., 12:22]
    got = gated_rms_norm(x, z, w, backend="triton")
    assert torch.equal(got, gated_rms_norm(x.contiguous(), z.contiguous(), w, backend="triton"))
    assert gated_rms_norm(x[:, :0], z[:, :0], w, backend="triton").shape == (2, 0, 10)
    weight = w.requires_grad_()
    (none,) = torch.autograd.grad(gated_rms_norm(x[:, :0], z[:, :0], weight, backend="triton").sum(), weight)
    assert (none == 0).all()


def test_norm_is_an_operator():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    operators = torch.ops.statewise
    torch.library.opcheck(operators.rms_norm_triton.default, (x, x.detach().clone(), w, 1e-5, 2))
    plain = (torch.randn(3, 8), x.detach(), None, w.detach(), 1e-5, 2)
    torch.library.opcheck(operators.rms_norm_triton_backward.default, plain)


def test_a_wide_norm_says_why_not():
    from statewise.ops.norm import reasons

    assert "a row of 32768 numbers at most, got 40000" in str(reasons(torch.zeros(1, 40000), None, None, 1)["triton"])
    assert math.isfinite(rms_norm(torch.ones(1, 40000)).sum().item())
