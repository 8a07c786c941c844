"""S4D against its own formulas written out, a minimal implementation, and the published sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewise import mixers
from statewise.maths import hippo
from statewise.maths.initialisers import DIAGONAL_INITS
from statewise.mixers import S4D, HasImpulse
from statewise.segments import Segments
from statewise.testing import assert_agree

F64 = torch.float64
BARE = {"activation": "none", "glu": False}


def parts(m: S4D) -> tuple[np.ndarray, ...]:
    """A, B, C, D, dt from the raw parameters of a mixer with the default transforms."""
    with torch.no_grad():
        A = -np.exp(m.A_real.numpy()) + 1j * m.A_imag.numpy()
        B, C = (torch.view_as_complex(t.contiguous()).numpy() for t in (m.B, m.C))
        return A, B, C, m.D.numpy(), np.exp(m.log_dt.numpy())


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", DIAGONAL_INITS)
def test_it_is_the_discretised_recurrence(rule, init):
    m = S4D(4, d_state=8, init=init, discretization=rule, **BARE).double()
    x = torch.randn(2, 60, 4, dtype=F64)
    A, B, C, D, dt = parts(m)
    z = dt[:, None] * A
    if rule == "zoh":
        a_bar, b_bar = np.exp(z), (np.exp(z) - 1) / A * B
    else:
        a_bar, b_bar = (1 + z / 2) / (1 - z / 2), dt[:, None] / (1 - z / 2) * B
    h, want = np.zeros((2, 4, 4), complex), []
    for t in range(60):
        u = x[:, t].numpy()
        h = a_bar * h + b_bar * u[..., None]
        want.append(2 * (C * h).sum(-1).real + D * u)
    y, state = m.extend(x, None)
    assert_agree(y, torch.from_numpy(np.stack(want, 1)), "y", 60)
    assert_agree(state, torch.from_numpy(h), "state", 60)
    # The impulse response is the first column of the Toeplitz matrix.
    kernel = m.impulse(60)
    dense = torch.stack([torch.from_numpy(scipy.linalg.toeplitz(k, np.zeros(60))) for k in kernel.detach().numpy()])
    assert_agree(torch.einsum("dts,bsd->btd", dense, x), y, "impulse response", 60)


class MinimalS4D(nn.Module):
    """Written from the formulas: S4D-Lin, zero-order hold, B = 1, a kernel and one Fourier transform."""

    def __init__(self, m: S4D):
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        m, L = self.m, x.shape[1]
        A = -torch.exp(m.A_real) + 1j * m.A_imag
        dtA = A * torch.exp(m.log_dt).unsqueeze(-1)
        C = torch.view_as_complex(m.C) * (torch.exp(dtA) - 1) / A
        K = 2 * torch.einsum("hn,hnl->hl", C, torch.exp(dtA.unsqueeze(-1) * torch.arange(L))).real
        u = x.mT
        y = torch.fft.irfft(torch.fft.rfft(K, 2 * L) * torch.fft.rfft(u, 2 * L), 2 * L)[..., :L]
        y = F.gelu(y + u * m.D.unsqueeze(-1)).mT
        return F.glu(F.linear(y, m.out_linear.weight, m.out_linear.bias), -1)


def test_parity_with_the_minimal_form():
    m = S4D(8, d_state=16, init="lin").double()
    assert torch.equal(m.B, torch.view_as_real(torch.ones(8, 8, dtype=torch.complex128)))
    x = torch.randn(2, 200, 8, dtype=F64, requires_grad=True)
    names = ["x", *(name for name, _ in m.named_parameters())]
    inputs = [x, *m.parameters()]
    got, want = m(x), MinimalS4D(m)(x)
    assert_agree(got, want, "y", 200)
    weight = torch.randn_like(got)
    for name, g, w in zip(
        names, torch.autograd.grad(got, inputs, weight), torch.autograd.grad(want, inputs, weight), strict=True
    ):
        assert_agree(g, w, f"gradient of {name}", 200)


def test_published_parameter_count():
    # Four layers of width 128 and state 64 on RGB pixels: "200K" in the README of the reference.
    H = 128
    layers = [nn.ModuleList([mixers.create("s4d", H, d_state=64, init="lin"), nn.LayerNorm(H)]) for _ in range(4)]
    network = nn.ModuleList([nn.Linear(3, H), *layers, nn.Linear(H, 10)])
    assert sum(p.numel() for p in layers[0].parameters()) == 49_920
    assert sum(p.numel() for p in network.parameters()) == 201_482


@pytest.mark.parametrize("n_ssm", [1, 2, 8])
def test_parameter_count_with_shared_systems(n_ssm):
    H, N = 8, 16
    m = S4D(H, d_state=N, n_ssm=n_ssm, train_b=True)
    assert sum(p.numel() for p in m.parameters()) == H * N + H + n_ssm * 2 * N + H + 2 * H * H + 2 * H
    untied = S4D(H, d_state=N, dt_tie=False)
    assert untied.log_dt.shape == (H, N // 2)


def test_channels_share_systems_in_turn():
    m = S4D(6, d_state=8, n_ssm=2, init="diag")
    A, B, _, _ = m.continuous()
    assert A.shape == B.shape == (6, 4)
    for h in range(6):
        assert torch.equal(A[h], A[h % 2])
    assert not torch.equal(A[0], A[1])


@pytest.mark.parametrize("init", DIAGONAL_INITS)
@pytest.mark.parametrize("real_transform", ["relu", "softplus", "none"])
@pytest.mark.parametrize("dt_transform", ["exp", "softplus"])
def test_every_parametrisation_starts_at_the_same_system(init, real_transform, dt_transform):
    def build(**options):
        torch.manual_seed(1)
        with torch.device("cpu"):
            torch.set_default_dtype(F64)
            try:
                return S4D(4, d_state=8, init=init, **BARE, **options)
            finally:
                torch.set_default_dtype(torch.float32)

    plain = build()
    m = build(real_transform=real_transform, dt_transform=dt_transform)
    assert_agree(m.impulse(50), plain.impulse(50), "impulse response", 50)
    m(torch.randn(1, 5, 4, dtype=F64)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


def test_legs_approaches_the_dense_system():
    # With B halved, the diagonal system tends to HiPPO-LegS itself as N grows, on smooth input.
    dt, steps = 1e-3, 4000
    t = torch.arange(steps, dtype=F64) * dt
    u = (torch.sin(2 * t) + torch.cos(5 * t)).reshape(1, steps, 1)

    def error(n: int) -> float:
        A, B = (part.numpy() for part in hippo.legs(n))
        full = scipy.linalg.expm(np.block([[A * dt, B[:, None] * dt], [np.zeros((1, n + 1))]]))
        h = np.zeros(n)
        for value in u[0, :, 0].numpy():
            h = full[:n, :n] @ h + full[:n, n] * value
        Lambda, V = hippo.legs_diagonal(n)
        m = S4D(1, d_state=n, init="legs", dt_min=dt, dt_max=dt, **BARE).double()
        with torch.no_grad():
            m.log_dt.fill_(math.log(dt))
            m.A_real.copy_((-Lambda.real).log())
            m.A_imag.copy_(Lambda.imag)
            m.B.copy_(torch.view_as_real(V.mH @ torch.from_numpy(B / 2 + 0j)))
            _, state = m.extend(u, None)
        rebuilt = 2 * (V @ state[0, 0]).real.numpy()
        return float(np.abs(rebuilt[:4] - h[:4]).max())

    errors = [error(n) for n in (16, 32, 64)]
    assert errors[1] < errors[0] / 1.5
    assert errors[2] < errors[1] / 1.5


def test_bandlimit():
    m = S4D(4, d_state=16, init="lin", bandlimit=1.0, dt_min=0.5, dt_max=0.5, **BARE)
    _, _, C, dt = m.continuous()
    # Im A = pi n at dt = 1/2 turns n/4 of a circle a step: 1/2 is reached at n = 2.
    assert (C[:, :3] != 0).all()
    assert (C[:, 3:] == 0).all()
    assert torch.allclose(dt, torch.tensor(0.5))


def test_precision_follows_the_parameters():
    m = S4D(4, d_state=8).double()
    y, state = m.extend(torch.randn(2, 9, 4, dtype=F64), m.init_state(2, dtype=F64))
    assert (y.dtype, state.dtype) == (F64, torch.complex128)
    assert m.init_state(2).dtype == torch.complex64
    m = S4D(4, d_state=8).bfloat16()
    y, state = m.extend(torch.randn(2, 9, 4).bfloat16(), None)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.complex64)


def test_autocast_keeps_the_state_space_in_single():
    m = S4D(4, d_state=8, **BARE)
    x = torch.randn(2, 50, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = m(x)
    assert torch.equal(got, m(x))


def test_dropout_drops_whole_channels():
    m = S4D(64, d_state=4, dropout=0.5, activation="none", glu=False).train()
    x = torch.randn(2, 30, 64)
    dropped = m(x) == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert 0 < dropped[:, 0].sum() < dropped[:, 0].numel()
    assert not (m.eval()(x) == 0).any()


def test_padding_may_hold_anything():
    m = S4D(4, d_state=8)
    seg = Segments.from_lengths([3, 12], 12, side="left")
    x = torch.randn(2, 12, 4).masked_fill(~seg.valid.unsqueeze(-1), torch.nan).requires_grad_()
    y = m(x, seg)
    assert (y[~seg.valid] == 0).all()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(gradient).all()


def test_meta_device_and_capabilities():
    with torch.device("meta"):
        m = S4D(512)
    assert m.C.is_meta
    assert issubclass(S4D, HasImpulse)
    assert {name for name, _ in S4D(4, train_b=True).named_parameters()} >= S4D.dynamics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "lin2"}, "unknown init 'lin2'"),
        ({"discretization": "zho"}, "did you mean 'zoh'"),
        ({"real_transform": "exq"}, "did you mean 'exp'"),
        ({"n_ssm": 3}, "n_ssm: want a divisor of d_model = 4, got 3"),
        ({"d_state": 5}, "even number"),
        ({"rate": 0.0}, "rate: want a positive"),
        ({"dropout": 1.0}, "dropout: want"),
        ({"dt_min": 0.0}, "dt_min"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        S4D(4, **options)
    with pytest.raises(ValueError, match=r"want \(B, L, D\) with D = 4"):
        S4D(4)(torch.randn(2, 3, 5))
