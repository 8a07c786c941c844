"""Linear systems along a path, against formulas, against whole derivatives, and against small changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from statewise import analysis, mixers
from statewise.mixers.base import CausalMixer
from statewise.testing import assert_agree

D, L = 3, 9
F64 = torch.float64


class RNN(CausalMixer):
    """h_t = bend(W h_{t-1} + U x_t), y = V h: Elman's network."""

    def __init__(self, bend):
        super().__init__()
        torch.manual_seed(0)
        self.W, self.U, self.V = (nn.Parameter(torch.randn(D, D, dtype=F64) / 2) for _ in range(3))
        self.bend = bend

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32):
        return torch.zeros(batch, D, dtype=dtype)

    def _run(self, x, state, seg):
        h = x.new_zeros(len(x), D) if state is None else state
        ys = []
        for t in range(x.shape[1]):
            h = self.bend(h @ self.W.mT + x[:, t] @ self.U.mT)
            ys.append(h @ self.V.mT)
        return torch.stack(ys, 1), h


def draw(length=L):
    return torch.randn(1, length, D, dtype=F64, generator=torch.Generator().manual_seed(1))


def test_a_linear_rnn_is_its_own_system():
    mixer, x = RNN(lambda h: h), draw()
    system = analysis.linearise(mixer, x)
    W, U, V = (p.detach() for p in mixer.parameters())
    for got, want in ((system.A, W), (system.B, U), (system.C, V @ W), (system.D, V @ U)):
        assert_agree(got, want.expand_as(got).contiguous(), "coefficients")
    y = mixer(x)[0].detach()
    assert_agree(system.y, y, "outputs", L)
    assert_agree(system.run(x[0]), y, "the recurrence", L)
    assert_agree(torch.einsum("tsij,sj->ti", system.matrix(), x[0]), y, "the matrix", L)


def test_an_elman_network_along_its_path():
    mixer, x = RNN(torch.tanh), draw()
    system = analysis.linearise(mixer, x)
    W, U, V = (p.detach() for p in mixer.parameters())
    h = torch.linalg.solve(V, mixer(x)[0].detach().mT).mT
    slope = torch.diag_embed(1 - h**2)
    assert_agree(system.A, slope @ W, "A", L)
    assert_agree(system.B, slope @ U, "B", L)
    assert_agree(system.C, V @ slope @ W, "C", L)
    assert_agree(system.D, V @ slope @ U, "D", L)
    assert system.eigenvalues.shape == (L, D)
    # To first order it is what a small change of the input does: the error falls with the square of the change.
    dx = draw(2 * L)[0, L:]
    errors = [(mixer(x + s * dx)[0] - system.y - s * system.run(dx)).norm().item() for s in (1e-3, 1e-4)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(
    ("name", "options"),
    [("lstm", {}), ("mamba2", {"d_state": 2, "head_dim": 2}), ("qlstm", {}), ("s4", {"d_state": 4}), ("rglru", {})],
)
def test_the_matrix_is_the_derivative_of_the_whole(name, options):
    torch.manual_seed(0)
    mixer, x = mixers.create(name, D + 1, **options).double().eval(), torch.randn(1, 5, D + 1, dtype=F64)
    system = analysis.linearise(mixer, x)
    want = torch.autograd.functional.jacobian(lambda x: mixer(x)[0], x).squeeze(2).transpose(1, 2)
    assert_agree(system.matrix(), want, name, 5)


def test_what_cannot_be_linearised_says_why():
    x = torch.randn(1, 4, 4)
    with pytest.raises(TypeError, match="linearise: mixer: want a causal mixer, which has a state, got Bidirectional"):
        analysis.linearise(mixers.create("bidirectional", 4, mixer="s4d"), x)
    with pytest.raises(TypeError, match="linearise: mixer: the state of Attention keeps its inputs as they are"):
        analysis.linearise(mixers.create("attention", 4), x)
    with pytest.raises(ValueError, match=r"linearise: x: want \(1, L, D\) with at least one token, got \(2, 4, 4\)"):
        analysis.linearise(mixers.LSTM(4), torch.randn(2, 4, 4))
    with pytest.raises(ValueError, match="4096 numbers of state; want at most 2048"):
        analysis.linearise(mixers.create("s4d", 64), torch.randn(1, 4, 64))
    with pytest.raises(ValueError, match="200 matrices of 2048 x 2048 are too many to keep; want at most 32 tokens"):
        analysis.linearise(mixers.create("s4d", 32), torch.randn(1, 200, 32))
