"""S4 against dense systems, the authors' weights and published sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statewise import mixers
from statewise.interop.s4_block import load_s4_block
from statewise.mixers import S4, S4D, BidirectionalS4, BidirectionalS4D, HasImpulse, HasMixing
from statewise.testing import assert_agree

F64, C128 = torch.float64, torch.complex128
BARE = {"activation": "none", "glu": False}
INITS = ["legs", "legt", "fout", "hippo"]


def dense(m: S4) -> tuple[Tensor, Tensor, Tensor]:
    """A, B, C (D, N, N), (D, N) in continuous time over both halves of each pair, and dt, from the raw parameters."""
    copies = m.d_model // m.n_ssm

    def both(t: Tensor) -> Tensor:
        return torch.cat([t, t.conj()], -1)

    A, B, P = (
        both(t).repeat(*[1] * (t.ndim - 2), copies, 1)
        for t in (torch.complex(-m.A_real.exp(), m.A_imag), torch.view_as_complex(m.B), torch.view_as_complex(m.P))
    )
    low = torch.einsum("rdn,rdm->dnm", P, P.conj())
    return torch.diag_embed(A) - low, B, both(torch.view_as_complex(m.C))


@pytest.mark.parametrize("init", INITS)
def test_it_is_the_bilinear_recurrence(init):
    m = S4(4, d_state=8, init=init, n_ssm=2, dt_max=0.5, **BARE).double()
    x, length = torch.randn(2, 60, 4, dtype=F64), 60
    with torch.no_grad():
        A, B, C = dense(m)
        dt = m.log_dt.exp().view(-1, 1, 1)
        eye = torch.eye(8, dtype=C128)
        left = eye - dt / 2 * A
        step, gain = torch.linalg.solve(left, eye + dt / 2 * A), torch.linalg.solve(left, dt * B.unsqueeze(-1))
        h, want = torch.zeros(2, 4, 8, dtype=C128), []
        for t in range(length):
            h = (step @ h.unsqueeze(-1) + gain * x[:, t, :, None, None]).squeeze(-1)
            want.append((C * h).sum(-1).real + m.D * x[:, t])
        y, state = m.extend(x, None)
    assert_agree(y, torch.stack(want, 1), "y", length)
    assert_agree(state, h[..., :4], "state", length)


@pytest.mark.parametrize("init", ["legs", "legt", "fout"])
def test_it_begins_as_the_hippo_system(init):
    """In the basis of the family itself: expm of the dense matrix is what the kernel approximates as dt -> 0."""
    from statewise.maths.dplr import diagonal_plus_low_rank, nplr

    N = 6
    m = S4(1, d_state=N, init=init, n_ssm=1).double()
    m.reset_dynamics()  # again, now in float64
    A, B, _ = (t[0].detach() for t in dense(m))
    V = diagonal_plus_low_rank(init, N).V.conj()  # the mixer keeps the half above the real axis
    V = torch.cat([V, V.conj()], 1)
    want_A, want_B, _ = nplr(init, N)
    # A decay of zero has no logarithm: the least that a mixer begins with is 1e-4.
    least = {"legs": 0.0, "legt": 1e-4, "fout": 1e-4}[init] * torch.eye(N, dtype=F64)
    assert_agree(V @ A @ V.mH, (want_A - least).to(C128), "A", N)
    into = V.mH @ want_B.to(C128)
    assert_agree(B, torch.complex(into.real, into.imag.clamp(-2, 2)), "B", N)  # clipped, as in the authors' code


def test_half_of_the_systems_of_hippo_begin_as_legs_and_half_as_fout():
    m = S4(4, d_state=8, init="hippo", n_ssm=4)
    alone = [S4(2, d_state=8, init=family, n_ssm=2) for family in ("legs", "fout")]
    for name in ("A_real", "A_imag", "B"):
        assert torch.equal(getattr(m, name), torch.cat([getattr(a, name) for a in alone]))
    assert torch.equal(m.P, torch.cat([a.P for a in alone], 1))


def block(H: int, N: int, n_ssm: int, directions: int, rank: int) -> int:
    """Parameters of a layer by the shapes of the authors' code."""
    return directions * H * N + H + n_ssm * (2 + rank) * N + H + 2 * H * H + 2 * H


@pytest.mark.parametrize("n_ssm", [1, 2, 8])
@pytest.mark.parametrize(
    ("name", "directions", "rank"), [("s4", 1, 1), ("bidirectional_s4", 2, 1), ("bidirectional_s4d", 2, 0)]
)
def test_parameter_count(name, directions, rank, n_ssm):
    options = {} if rank else {"train_b": True}
    m = mixers.create(name, 8, d_state=16, n_ssm=n_ssm, **options)
    assert sum(p.numel() for p in m.parameters()) == block(8, 16, n_ssm, directions, rank)
    assert m.dynamics <= {name for name, _ in m.named_parameters()}


@pytest.mark.parametrize(
    ("total", "H", "N", "n_ssm", "last_norm", "other"),
    [
        # Six layers, each with a norm; a last norm after layers with the norm in front. Around them: ListOps an
        # embedding of 18 tokens and 10 classes, Image 1 input and 10 classes, Pathfinder 1 and 2, Speech Commands 1
        # and 35.
        pytest.param(815_186, 256, 4, 1, 0, 18 * 256 + 10 * 257, id="ListOps"),
        pytest.param(3_564_682, 512, 64, 1, 0, 2 * 512 + 10 * 513, id="Image"),
        pytest.param(1_288_706, 256, 64, 256, 1, 2 * 256 + 2 * 257, id="Pathfinder"),
        pytest.param(306_851, 128, 64, 2, 1, 2 * 128 + 35 * 129, id="Speech Commands"),
    ],
)
def test_published_sizes(total, H, N, n_ssm, last_norm, other):
    with torch.device("meta"):
        m = mixers.create("bidirectional_s4", H, d_state=N, n_ssm=n_ssm)
    mixer = sum(p.numel() for p in m.parameters())
    assert 6 * (mixer + 2 * H) + last_norm * 2 * H + other == total


def test_no_call_changes_a_weight_and_any_length_works():
    m = S4(4, d_state=8, **BARE).double()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    x = torch.randn(1, 300, 4, dtype=F64)
    short, whole = m(x[:, :40]), m(x)
    assert_agree(short, whole[:, :40], "a shorter call", 300)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


# ---- the authors' parametrisation ------------------------------------------------------------------------------------


def authors_kernel(weights: dict[str, Tensor], length: int) -> Tensor:
    """From C (I - A_bar^L) by the truncated generating function, written from the paper with dense matrices."""

    def both(t: Tensor) -> Tensor:
        t = torch.view_as_complex(t)
        return torch.cat([t, t.conj()], -1)

    A = torch.complex(-weights["kernel.A_real"].exp(), -weights["kernel.A_imag"])
    A = torch.diag_embed(torch.cat([A, A.conj()], -1))
    P, B, C = both(weights["kernel.P"]), both(weights["kernel.B"]), both(weights["kernel.C"])
    copies = C.shape[1] // A.shape[0]
    A = (A - torch.einsum("rsn,rsm->snm", P, P.conj())).repeat(copies, 1, 1)
    dt = weights["kernel.inv_dt"].exp().unsqueeze(-1)
    omega = torch.exp(-2j * torch.pi * torch.arange(length, dtype=F64) / length)
    # Odd lengths never reach omega = -1.
    z = (2 * (1 - omega) / (1 + omega)).view(-1, 1, 1, 1)
    resolvent = torch.linalg.solve(
        z * torch.eye(A.shape[-1]) - dt * A, (dt.squeeze(-1) * B[0].repeat(copies, 1)).unsqueeze(-1)
    )
    values = torch.einsum("chn,lhn->chl", C, resolvent.squeeze(-1)) * 2 / (1 + omega)
    return torch.fft.ifft(values, n=length).real


def block_weights(H: int, N: int, directions: int, n_ssm: int, length: int) -> dict[str, Tensor]:
    from statewise.maths.dplr import diagonal_plus_low_rank

    part = diagonal_plus_low_rank("legs", N)
    pairs = lambda t, *shape: torch.view_as_real(t.resolve_conj()).expand(*shape, N // 2, 2).clone()  # noqa: E731
    return {
        "layer.kernel.C": torch.randn(directions, H, N // 2, 2, dtype=F64),
        "layer.kernel.B": pairs(part.B, 1, n_ssm),
        "layer.kernel.inv_dt": torch.linspace(-5, -1.5, H, dtype=F64).unsqueeze(-1),
        "layer.kernel.A_real": torch.full((n_ssm, N // 2), 0.5, dtype=F64).log(),
        "layer.kernel.A_imag": -part.Lambda.imag.expand(n_ssm, -1).clone(),
        "layer.kernel.P": pairs(part.P.unsqueeze(1), 1, n_ssm),
        "layer.kernel.l_kernel": torch.tensor(length),
        "layer.D": torch.randn(1, H, dtype=F64),
        "output_linear.0.weight": torch.randn(2 * H, H, dtype=F64),
        "output_linear.0.bias": torch.randn(2 * H, dtype=F64),
    }


@pytest.mark.parametrize(("name", "directions"), [("s4", 1), ("bidirectional_s4", 2)])
def test_weights_of_the_authors_block(name, directions):
    weights = block_weights(6, 8, directions, 2, 33)
    m = mixers.create(name, 6, d_state=8, n_ssm=2).double()
    load_s4_block(m, weights)
    want = authors_kernel({k.removeprefix("layer."): v for k, v in weights.items()}, 33)
    assert_agree(m.kernels(33).reshape(want.shape), want, "kernel", 33)
    x = torch.randn(2, 33, 6, dtype=F64)
    y = x * m.D
    for t in range(33):
        y[:, t] = y[:, t] + sum(want[0][:, t - s] * x[:, s] for s in range(t + 1))
        if directions > 1:
            y[:, t] = y[:, t] + sum((want[1][:, s - t - 1] * x[:, s] for s in range(t + 1, 33)), torch.zeros(2, 6))
    y = F.glu(F.linear(F.gelu(y), weights["output_linear.0.weight"], weights["output_linear.0.bias"]), -1)
    assert_agree(m(x), y, "block", 33)


def test_weights_of_another_block_are_refused():
    weights = block_weights(6, 8, 1, 2, 33)
    m = S4(6, d_state=8, n_ssm=2)
    with pytest.raises(KeyError, match="missing"):
        load_s4_block(m, {k: v for k, v in weights.items() if k != "layer.D"})
    with pytest.raises(KeyError, match="unknown"):
        load_s4_block(S4D(6, d_state=8, n_ssm=2), weights)
    with pytest.raises(ValueError, match=r"kernel.inv_dt: has shape \(4, 1\), the mixer wants \(6,\)"):
        load_s4_block(m, block_weights(4, 8, 1, 2, 33))
    with pytest.raises(ValueError, match="l_kernel: want 0 or more, got -1"):
        load_s4_block(m, weights | {"layer.kernel.l_kernel": torch.tensor(-1)})


# ---- types and errors ------------------------------------------------------------------------------------------------


def test_capabilities_and_meta_device():
    assert issubclass(S4, HasImpulse)
    for cls in (BidirectionalS4, BidirectionalS4D):
        assert issubclass(cls, HasMixing)
        assert not issubclass(cls, (HasImpulse, mixers.Causal))
    assert S4.dynamics == {"log_dt", "A_real", "A_imag", "B", "P"}
    m = S4(4, d_state=8, init="legt")
    assert (m.rank, m.P.shape) == (2, (2, 4, 4, 2))
    y, state = m.bfloat16().extend(torch.randn(2, 30, 4).bfloat16(), None)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.complex64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "lgs"}, "did you mean 'legs'"),
        ({"init": "legt", "rank": 1}, "rank: init='legt' needs 2, got 1"),
        ({"init": "hippo", "n_ssm": 1}, "n_ssm: init='hippo' is half"),
        ({"n_ssm": 3}, "n_ssm: want a divisor of d_model = 4, got 3"),
        ({"d_state": 5}, "even number"),
        ({"rate": 0.0}, "rate: want a positive"),
        ({"real_transform": "exq"}, "did you mean 'exp'"),
    ],
)
def test_errors(options, message):
    for cls in (S4, BidirectionalS4):
        with pytest.raises(ValueError, match=message):
            cls(4, **options)
    with pytest.raises(ValueError, match=r"want \(B, L, D\) with D = 4"):
        S4(4)(torch.randn(2, 3, 5))
