"""DSS and DLR against their formulas written out, and the limits that tie them to S4D and to each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statewise.maths import hippo
from statewise.mixers import DLR, DSS, S4D
from statewise.testing import assert_agree

F64 = torch.float64
BARE = {"activation": "none", "glu": False}


def numbers(m: DSS | DLR) -> dict[str, np.ndarray]:
    """The raw parameters, W as complex numbers."""
    raw = {name: p.detach().numpy() for name, p in m.named_parameters()}
    return raw | {"W": raw["W"][..., 0] + 1j * raw["W"][..., 1]}


def softmax_kernel(m: DSS, length: int) -> Tensor:
    """Re(W / Lambda softmax(dt Lambda l)) with the softmax over l < length written out."""
    raw = numbers(m)
    Lambda = raw["Lambda_re"] + 1j * raw["Lambda_im"]
    dt = np.exp(raw["log_dt"])
    z = dt[:, :1] * Lambda.real + 1j * dt[:, -1:] * Lambda.imag
    # The largest exponent is taken out: growing modes would overflow.
    exponent = z[..., None] * np.arange(length)
    exponent = exponent - np.maximum(z.real, 0)[..., None] * (length - 1)
    weights = np.exp(exponent) / np.exp(exponent).sum(-1, keepdims=True)
    return torch.from_numpy(np.einsum("dn,dnl->dl", raw["W"] / Lambda, weights).real)


def without_skip(m: DSS | DLR, length: int) -> Tensor:
    with torch.no_grad():
        m.D.zero_()
    return m.impulse(length)


@pytest.mark.parametrize("dt_tie", [True, False])
@pytest.mark.parametrize("growing", [0.0, 0.7])
@pytest.mark.parametrize("length", [2, 9, 300])
def test_softmax_kernel(length, growing, dt_tie):
    m = DSS(5, d_state=6, l_norm=length, dt_tie=dt_tie, **BARE).double()
    with torch.no_grad():
        m.Lambda_re[::2] += growing
        m.log_dt[:, -1] += 0.0 if dt_tie else 0.5
    assert_agree(without_skip(m, length), softmax_kernel(m, length), "kernel", length)
    y = m(torch.eye(length, dtype=F64)[:1, :, None].expand(1, length, 5))
    assert_agree(y[0].mT, m.impulse(length), "forward is the convolution", length)


def test_a_normaliser_near_zero_is_bounded():
    # Re Lambda = 0 and a whole turn over l_norm: the weights add up to nothing.
    m = DSS(1, d_state=2, l_norm=16, **BARE)
    with torch.no_grad():
        m.log_dt.zero_()
        m.Lambda_re.zero_()
        m.Lambda_im.copy_(torch.tensor([2 * math.pi / 16, 0.0]))
    kernel = m.impulse(16)
    kernel.sum().backward()
    assert torch.isfinite(kernel).all()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)


def test_growing_modes_stay_finite_on_long_rows():
    length = 16_384
    m = DSS(3, d_state=8, l_norm=length, **BARE)
    with torch.no_grad():
        m.Lambda_re.copy_(torch.linspace(-0.5, 2.0, 8))
    assert (m.continuous()[1].real.amax(1) * length <= 64.001).all()
    kernel = without_skip(m, length)
    assert torch.isfinite(kernel).all()
    exact = without_skip(m.double(), length).float()
    assert (kernel - exact).abs().max() < 1e-3 * exact.abs().max()
    # What grows weighs the oldest most.
    assert kernel[:, -10:].abs().amax() > 10 * kernel[:, 1000:-5000].abs().amax()
    y, _ = m.float().extend(torch.randn(1, length, 3), None)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


def test_growth_has_the_gradient_of_the_softmax():
    m = DSS(2, d_state=3, l_norm=20, **BARE).double()
    with torch.no_grad():
        m.Lambda_re.copy_(torch.tensor([0.4, 1.5, -0.2]))
    weight = torch.randn(2, 20, dtype=F64)

    def loss(Lambda_re: Tensor) -> Tensor:
        z = m.log_dt.exp() * torch.complex(Lambda_re, m.Lambda_im)
        weights = torch.exp(z[..., None] * torch.arange(20))
        weights = weights / weights.sum(-1, keepdim=True)
        W = torch.view_as_complex(m.W) / torch.complex(Lambda_re, m.Lambda_im)
        return (torch.einsum("dn,dnl->dl", W, weights).real * weight).sum()

    want = torch.autograd.grad(loss(m.Lambda_re), m.Lambda_re)[0]
    got = torch.autograd.grad((m.impulse(20) * weight).sum(), m.Lambda_re)[0]
    assert_agree(got, want, "gradient", 20)


@pytest.mark.parametrize("init", ["legs", "lin", "rand"])
def test_exp_kernel_is_the_zero_order_hold(init):
    m = DSS(4, d_state=5, kernel="exp", init=init, **BARE).double()
    raw = numbers(m)
    Lambda = -np.exp(raw["Lambda_re"]) + 1j * raw["Lambda_im"]
    z = np.exp(raw["log_dt"]) * Lambda
    powers = np.exp(z[..., None] * np.arange(40))
    want = np.einsum("dn,dnl->dl", raw["W"] * (np.exp(z) - 1) / Lambda, powers).real
    assert_agree(without_skip(m, 40), torch.from_numpy(want), "kernel", 40)


def test_exp_with_conjugate_pairs_is_s4d():
    s4d = S4D(3, d_state=8, n_ssm=1, init="lin", **BARE).double()
    m = DSS(3, d_state=8, kernel="exp", **BARE).double()
    with torch.no_grad():
        m.log_dt.copy_(s4d.log_dt[:, None])
        m.Lambda_re.copy_(s4d.A_real[0].repeat(2))
        m.Lambda_im.copy_(torch.cat([s4d.A_imag[0], -s4d.A_imag[0]]))
        m.W.copy_(torch.cat([s4d.C, s4d.C * torch.tensor([1.0, -1.0])], 1))
        m.D.copy_(s4d.D)
    x = torch.randn(2, 70, 3, dtype=F64)
    assert_agree(m(x), s4d(x), "y", 70)


def test_the_limit_of_softmax_is_exp_with_another_sign():
    m = DSS(4, d_state=5, **BARE).double()
    exp = DSS(4, d_state=5, kernel="exp", **BARE).double()
    with torch.no_grad():
        exp.Lambda_re.copy_((-m.Lambda_re).log())
        exp.Lambda_im.copy_(m.Lambda_im)
        exp.log_dt.copy_(m.log_dt)
        exp.W.copy_(-m.W)
    limit = without_skip(m, 50)
    assert_agree(limit, without_skip(exp, 50), "kernel", 50)
    with torch.no_grad():
        m.log_dt.fill_(math.log(0.1))
    limit = without_skip(m, 50)
    errors = []
    for length in (10, 100, 1000):
        m.l_norm = length
        errors.append((without_skip(m, 50) - limit).abs().max().item())
    # The part of the weights beyond l_norm falls as exp(-l_norm dt / 2).
    assert errors[1] < 0.05 * errors[0]
    assert errors[2] < 1e-12 * errors[0] + torch.finfo(F64).eps * limit.abs().max().item()


def test_finite_normalisation_is_the_limit_rescaled():
    m = DSS(4, d_state=5, **BARE).double()
    _, b, _, _ = m.discrete()
    z = m.continuous()[1]
    m.l_norm = 30
    assert_agree(m.discrete()[1], b / (1 - torch.exp(30 * z)), "B_bar", 30)


def test_without_a_length_modes_decay():
    m = DSS(4, d_state=5, **BARE)
    with torch.no_grad():
        m.Lambda_re.fill_(3.0)
    assert (m.discrete()[0].real < 0).all()
    assert torch.isfinite(m(torch.randn(1, 3000, 4))).all()


@pytest.mark.parametrize("d_state", [1, 6])
def test_initial_values_of_dss(d_state):
    m = DSS(2000, d_state=d_state)
    skew = hippo.legs_normal(2 * d_state) + torch.eye(2 * d_state) / 2
    frequencies = torch.linalg.eigvals(skew).imag
    want = frequencies[frequencies > 0].sort(descending=True).values
    assert_agree(m.Lambda_im.double(), want.float().double(), "Im Lambda", d_state)
    assert (m.Lambda_re == -0.5).all()
    assert torch.equal(DSS(1, d_state=4, init="lin").Lambda_im, (math.pi * torch.arange(4)).float())
    assert torch.allclose(DSS(1, d_state=4, kernel="exp").Lambda_re.exp(), torch.tensor(0.5))
    # Each part of W is standard normal; log dt is uniform.
    n = m.W.numel()
    assert abs(m.W.mean().item()) < 5 / n**0.5
    assert abs(m.W.var().item() - 1) < 5 * (2 / n) ** 0.5
    log_dt = m.log_dt.flatten()
    low, high = math.log(1e-3), math.log(0.1)
    assert low <= log_dt.min() < low + 0.05
    assert high - 0.05 < log_dt.max() <= high
    assert abs(log_dt.mean().item() - (low + high) / 2) < 5 * (high - low) / (12 * 2000) ** 0.5


def test_parameter_counts():
    H, N = 8, 6
    tail = 2 * H * H + 2 * H
    assert sum(p.numel() for p in DSS(H, d_state=N).parameters()) == 2 * H * N + 2 * N + H + H + tail
    assert sum(p.numel() for p in DSS(H, d_state=N, dt_tie=False).parameters()) == 2 * H * N + 2 * N + 2 * H + H + tail
    assert sum(p.numel() for p in DLR(H, d_state=N).parameters()) == 2 * H * N + 2 * N + H + tail


# ---- DLR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["omega", "rand"])
def test_dlr_is_its_recurrence(init):
    m = DLR(3, d_state=7, init=init).double()
    raw = numbers(m)
    a = np.exp(-(raw["p"] ** 2) + 1j * raw["theta"])
    x = torch.randn(2, 60, 3, dtype=F64)
    h, want = np.zeros((2, 3, 7), complex), []
    for u in x.unbind(1):
        h = a * h + u.numpy()[..., None]
        want.append((raw["W"] * h).sum(-1).real + raw["D"] * u.numpy())
    y = F.glu(F.linear(F.gelu(torch.from_numpy(np.stack(want, 1))), m.tail.linear.weight, m.tail.linear.bias), -1)
    got, state = m.extend(x, None)
    assert_agree(got, y, "y", 60)
    assert_agree(state, torch.from_numpy(h), "state", 60)
    assert_agree(m(x), y, "forward", 60)


def test_initial_values_of_dlr():
    N = 4096
    m = DLR(4, d_state=N, dt_min=1e-4, dt_max=0.1)
    assert torch.equal(m.theta, (2 * math.pi / N * torch.arange(N)).float())
    log_dt = (2 * m.p.square()).log()
    low, high = math.log(1e-4), math.log(0.1)
    assert low - 1e-3 <= log_dt.min() < low + 0.05
    assert high - 0.05 < log_dt.max() <= high + 1e-3
    assert abs(log_dt.mean().item() - (low + high) / 2) < 5 * (high - low) / (12 * N) ** 0.5
    # Each part of W is normal with standard deviation 1 / N.
    assert abs(m.W.var().item() * N**2 - 1) < 5 * (2 / m.W.numel()) ** 0.5
    # At first N modes of equal weight would be the unit impulse at lag 0, N, 2 N ...
    with torch.no_grad():
        m.W.copy_(torch.tensor([1 / N, 0.0]))
        m.p.zero_()
    kernel = without_skip(m.double(), 50)
    assert_agree(kernel[:, 0], torch.ones(4, dtype=F64), "lag 0", N)
    assert_agree(kernel[:, 1:], torch.zeros(4, 49, dtype=F64), "other lags", N, at_least=1e5)
    assert ((DLR(4, d_state=64, init="rand").theta - math.pi).abs() <= math.pi).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DSS(4, kernel="softmx"), "did you mean 'softmax'"),
        (lambda: DSS(4, init="leg"), "did you mean 'legs'"),
        (lambda: DSS(4, d_state=0), "d_state: want at least one mode, got 0"),
        (lambda: DSS(4, l_norm=0), "l_norm: want a positive length"),
        (
            lambda: DSS(4, kernel="exp", l_norm=8),
            "l_norm: want a positive length with kernel='softmax', got 8 with 'exp'",
        ),
        (lambda: DSS(4, dt_min=0.0), "dt_min"),
        (lambda: DSS(4, activation="relu"), "activation"),
        (lambda: DSS(4, dropout=1.0), "dropout: want"),
        (lambda: DLR(4, init="omga"), "did you mean 'omega'"),
        (lambda: DLR(4, d_state=0), "d_state: want at least one mode, got 0"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_dropout_drops_whole_channels():
    m = DSS(64, d_state=2, dropout=0.5, **BARE).train()
    x = torch.randn(2, 30, 64)
    dropped = m(x) == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert 0 < dropped[:, 0].sum() < dropped[:, 0].numel()
    assert not (m.eval()(x) == 0).any()
