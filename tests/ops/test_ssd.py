"""What is particular to SSD: chunk sizes, autocast, bad input."""

from __future__ import annotations

import pytest
import torch

from statewise.ops.ssd import cases, ssd, ssd_step


def inputs(variant="plain", batch=2, length=50, dtype=torch.float32, decay="mixed", seed=0, **size):
    generator = torch.Generator().manual_seed(seed)
    return cases.sample(variant, batch, length, dtype=dtype, decay=decay, generator=generator, **size)


@pytest.mark.parametrize("chunk", [1, 7, 16, 50, 1000])
@pytest.mark.parametrize("variant", ["plain", "groups", "gated"])
def test_any_chunk_size_gives_the_recurrence(chunk, variant):
    given = inputs(variant, dtype=torch.float64)
    expected, state = ssd(**given, algorithm="recurrent")
    y, s = ssd(**given, chunk_size=chunk)
    rounding = 100 * torch.finfo(torch.float64).eps
    assert (y - expected).abs().max() <= rounding * expected.abs().max()
    assert (s - state).abs().max() <= rounding * state.abs().max()


def test_autocast_leaves_decays_in_float32():
    given = inputs(decay="slow", length=200)
    expected, state = ssd(**given)
    with torch.autocast("cpu", torch.bfloat16):
        y, s = ssd(**given)
    assert torch.equal(y, expected)
    assert torch.equal(s, state)


def test_gradient_of_fast_decays_does_not_cancel():
    """Differences of running sums would make the gradient of A wrong in the fourth digit here."""

    def gradient(algorithm: str, dtype: torch.dtype):
        given = inputs(decay="fast", length=128)
        given = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        given["A"].requires_grad_()
        ssd(**given, algorithm=algorithm)[0].square().sum().backward()
        return given["A"].grad.double()

    truth = gradient("recurrent", torch.float64)
    honest = (gradient("recurrent", torch.float32) - truth).abs().max()
    floor = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (gradient("chunk", torch.float32) - truth).abs().max() <= max(4 * honest, floor)


def test_published_minimal_form():
    """The quadratic (attention) form of the paper, written out: M = (C B^T) * L with L the 1-semiseparable mask."""
    given = inputs(dtype=torch.float64, length=20)
    x, dt, A, b, c, D = (given[k] for k in ("x", "dt", "A", "B", "C", "D"))
    y = torch.zeros_like(x)
    for t in range(20):
        for s in range(t + 1):
            decay = (dt[:, s + 1 : t + 1].sum(1) * A).exp()
            weight = (c[:, t, 0] * b[:, s, 0]).sum(-1)[:, None] * decay * dt[:, s]
            y[:, t] += weight[..., None] * x[:, s]
    y += D[:, None] * x
    got = ssd(**given)[0]
    assert (got - y).abs().max() <= 100 * torch.finfo(torch.float64).eps * y.abs().max()


def test_step_without_history():
    given = inputs(length=1)
    y, state = ssd(**given, algorithm="recurrent")
    first = {k: v[:, 0] if k in ("x", "dt", "B", "C") else v for k, v in given.items()}
    y_t, s = ssd_step(**first, state=torch.zeros_like(state))
    rounding = 8 * torch.finfo(torch.float32).eps
    assert (y_t - y[:, 0]).abs().max() <= rounding * y.abs().max()
    assert (s - state).abs().max() <= rounding * state.abs().max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": lambda t: t[..., 0]}, ValueError, r"ssd: x: want shape \(B, L, H, P\), got"),
        ({"dt": lambda t: t[..., :1]}, ValueError, r"ssd: dt: want shape \(B, L, H\) = \(2, 50, 4\), got \(2, 50, 1\)"),
        ({"C": lambda t: t[..., :-1]}, ValueError, r"ssd: C: want shape"),
        ({"B": lambda t: t.double()}, TypeError, r"ssd: B is torch.float64 but x is torch.float32"),
        ({"chunk_size": lambda _: 0}, ValueError, r"ssd: chunk_size: want a positive number, got 0"),
    ],
)
def test_bad_input(change, error, message):
    given = inputs()
    name, alter = next(iter(change.items()))
    given[name] = alter(given.get(name))
    with pytest.raises(error, match=message):
        ssd(**given)


def test_groups_must_divide_heads():
    given = inputs(size=(6, 4, 3))
    given["B"] = given["B"].expand(-1, -1, 4, -1)
    given["C"] = given["C"].expand(-1, -1, 4, -1)
    with pytest.raises(ValueError, match="want groups G that divide the 6 heads, got G = 4"):
        ssd(**given)
