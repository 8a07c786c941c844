"""GSS: the published layer written out, its sizes, and what its core has to do with DSS."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statewise.mixers import DSS, GSS
from statewise.testing import assert_agree

F64 = torch.float64


def test_parity_with_the_layer_written_out():
    m = GSS(8, d_state=6, d_ssm=3, expand=2).double()
    with torch.no_grad():
        m.norm.weight.normal_()
        m.norm.bias.normal_()
    x = torch.randn(2, 50, 8, dtype=F64, requires_grad=True)
    L = x.shape[1]
    Lambda = -m.ssm.Lambda_re.exp() + 1j * m.ssm.Lambda_im.exp()
    C = torch.view_as_complex(m.ssm.W) * (torch.exp(Lambda) - 1) / Lambda
    K = torch.einsum("hn,nl->hl", C, torch.exp(Lambda[:, None] * torch.arange(L))).real
    u = F.layer_norm(F.gelu(x @ m.u_proj.weight.T), (3,), m.norm.weight, m.norm.bias)
    lag = torch.arange(L)[:, None] - torch.arange(L)
    y = torch.einsum("hts,bsh->bth", K[:, lag.clamp(min=0)] * (lag >= 0), u) + m.ssm.D * u
    want = ((y @ m.up_proj.weight.T) * F.gelu(x @ m.v_proj.weight.T)) @ m.out_proj.weight.T
    got = m(x)
    assert_agree(got, want, "y", L)
    inputs, weight = [x, *m.parameters()], torch.randn_like(got)
    names = ["x", *(name for name, _ in m.named_parameters())]
    grads = zip(names, torch.autograd.grad(got, inputs, weight), torch.autograd.grad(want, inputs, weight), strict=True)
    for name, g, w in grads:
        assert_agree(g, w, f"gradient of {name}", L)
    assert_agree(m.ssm.impulse(L)[:, 1:], K[:, 1:], "impulse of the core", L)


def test_the_core_is_dss_at_step_one():
    core = GSS(16, d_state=5).double().ssm
    dss = DSS(4, d_state=5, kernel="exp", activation="none", glu=False).double()
    with torch.no_grad():
        dss.log_dt.zero_()
        dss.Lambda_re.copy_(core.Lambda_re)
        dss.Lambda_im.copy_(core.Lambda_im.exp())
        dss.W.copy_(core.W)
        dss.D.copy_(core.D)
    assert_agree(core.impulse(60), dss.impulse(60), "kernel", 60)


def test_published_sizes():
    # Width 1024, state space of 256 channels and 512 modes, gated branch of 4096.
    with torch.device("meta"):
        m = GSS(1024)
    assert (m.d_ssm, m.d_inner, m.ssm.d_state) == (256, 4096, 512)
    maps = 1024 * 256 + 1024 * 4096 + 256 * 4096 + 4096 * 1024
    assert sum(p.numel() for p in m.parameters()) == maps + 2 * 256 + 2 * 256 * 512 + 2 * 512 + 256
    assert GSS(8, d_state=3).init_state(2).shape == (2, 2, 3)


def test_initial_values():
    core = GSS(64, d_state=4000).ssm
    for p in (core.Lambda_re, core.Lambda_im, core.W, core.D):
        n = p.numel()
        assert abs(p.mean().item()) < 5 / n**0.5
        assert abs(p.var().item() - 1) < 5 * (2 / n) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_ssm": 0}, "d_ssm: want a positive number, got 0"),
        ({"expand": 0}, "expand: want a positive number, got 0"),
        ({"d_state": 0}, "d_state: want at least one mode, got 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        GSS(4, **options)
