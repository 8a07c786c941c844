"""qLSTM against its equations, written out here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statewise import mixers
from statewise.testing import assert_agree

L = 19


@pytest.mark.parametrize("reverse", [True, False])
@torch.no_grad()
def test_equations(reverse):
    torch.manual_seed(0)
    mixer = mixers.QLSTM(6, reverse_gate=reverse).double()
    if reverse:
        mixer.alpha.fill_(1.7)
    x = torch.randn(2, L, 6, dtype=torch.float64)
    z, u = mixer.in_proj(x).chunk(2, -1)
    taps = mixer.conv1d.weight.unsqueeze(1)
    u = F.conv1d(F.pad(u.mT, (taps.shape[-1] - 1, 0)), taps, mixer.conv1d.bias, groups=u.shape[-1]).mT
    forget, write, read = mixer.gates(u).chunk(3, -1)
    a = torch.sigmoid(-forget) ** 1.7 if reverse else torch.sigmoid(forget)
    h, ys = torch.zeros_like(u[:, 0]), []
    for t in range(L):
        h = a[:, t] * h + torch.sigmoid(write[:, t]) * u[:, t]
        ys.append(torch.sigmoid(read[:, t]) * h)
    want = mixer.out_proj(F.gelu(z) * torch.stack(ys, 1))
    assert_agree(mixer(x), want, "qLSTM", L)


def test_parameters():
    """Input 2 h d, convolution 5 h, gates 3 h (h + 1), alpha 1, output h d; h = 2 d."""
    d, h = 16, 32
    count = sum(p.numel() for p in mixers.QLSTM(d).parameters())
    assert count == 2 * h * d + 5 * h + 3 * h * (h + 1) + 1 + h * d
    assert mixers.QLSTM.dynamics == {"alpha"}


def test_mistakes():
    with pytest.raises(ValueError, match="expand: want expand"):
        mixers.QLSTM(4, expand=0.1)
