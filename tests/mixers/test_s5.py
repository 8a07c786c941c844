"""S5 against the full system of conjugate pairs, against S4D kernels, and the published sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from statewise import ops
from statewise.maths import hippo
from statewise.maths.discretize import zoh
from statewise.mixers import S5, BidirectionalS5, HasImpulse, SequenceMixer
from statewise.mixers.s5 import ACTIVATIONS, C_INITS
from statewise.segments import Segments
from statewise.testing import assert_agree

F64 = torch.float64


def bare(d_model: int, **options) -> S5:
    return S5(d_model, activation="none", **options).double()


def as_complex(t: torch.Tensor) -> np.ndarray:
    return torch.view_as_complex(t.detach()).numpy()


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("length", [1, 37, 64])
def test_it_is_the_recurrence_of_all_conjugate_pairs(rule, length):
    m = bare(3, d_state=16, blocks=2, discretization=rule)
    x = torch.randn(2, length, 3, dtype=F64)
    both = lambda t: np.concatenate([t, t.conj()])  # noqa: E731
    Lambda = both(m.Lambda_re.detach().numpy() + 1j * m.Lambda_im.detach().numpy())
    dt = np.tile(np.exp(m.log_step.detach().numpy()), 2)
    B, C = both(as_complex(m.B)), both(as_complex(m.C).T).T
    z = Lambda * dt
    a, g = (np.exp(z), (np.exp(z) - 1) / Lambda) if rule == "zoh" else ((1 + z / 2) / (1 - z / 2), dt / (1 - z / 2))
    start = torch.randn(2, 8, dtype=torch.complex128)
    h, want = np.concatenate([start.numpy(), start.numpy().conj()], 1), []
    for t in range(length):
        u = x[:, t].numpy()
        h = a * h + (g[:, None] * B @ u.T).T
        y = (C @ h.T).T
        assert np.abs(y.imag).max() <= 1e3 * np.finfo(float).eps * max(1.0, np.abs(y).max())
        want.append(y.real + m.D.detach().numpy() * u)
    y, state = m.extend(x, start)
    assert_agree(y, torch.from_numpy(np.stack(want, 1)), "y", length)
    assert_agree(state, torch.from_numpy(h[:, :8]), "state", length)


def test_one_channel_is_an_s4d_kernel():
    m = bare(1, d_state=16)
    x = torch.randn(2, 90, 1, dtype=F64)
    Lambda = torch.complex(m.Lambda_re, m.Lambda_im)
    log_a, b = zoh(Lambda, m.log_step.exp(), torch.view_as_complex(m.B)[:, 0])
    kernel = ops.diagonal_kernel(log_a[None], torch.view_as_complex(m.C) * b, 90)
    assert_agree(m(x), ops.lti_conv(x, kernel, m.D), "y", 90)


def test_many_channels_are_a_sum_of_s4d_kernels():
    m = bare(3, d_state=8)
    x = torch.randn(2, 50, 3, dtype=F64)
    Lambda = torch.complex(m.Lambda_re, m.Lambda_im)
    log_a, B = zoh(Lambda[:, None], m.log_step.exp()[:, None], torch.view_as_complex(m.B))
    C = torch.view_as_complex(m.C)
    for out in range(3):
        kernels = ops.diagonal_kernel(log_a.T.expand(3, -1), C[out] * B.T, 50)
        want = ops.lti_conv(x, kernels).sum(-1) + m.D[out] * x[..., out]
        assert_agree(m(x)[..., out], want, f"output {out}", 50)
        response = m.impulse(50)[out]
        assert_agree(response - kernels, nn.functional.pad(m.D[out] * torch.eye(3, dtype=F64)[:, out, None], (0, 49)),
                     "impulse response")  # fmt: skip


def layer_parameters(H: int, P: int, blocks: int) -> int:
    return 3 * P // 2 + 3 * P * H + 3 * H + H * H + H


@pytest.mark.parametrize(
    ("task", "layers", "H", "P", "blocks", "inputs", "classes", "published"),
    [
        ("ListOps", 8, 128, 16, 8, 20, 10, 188_490),
        ("Text", 6, 256, 192, 12, 135, 2, 1_321_154),
        ("Image", 6, 512, 384, 3, 1, 10, 5_133_706),
        ("Pathfinder", 6, 192, 256, 8, 1, 2, 1_113_602),
        ("Path-X", 6, 128, 256, 16, 1, 2, 694_018),
        ("Speech", 6, 96, 128, 16, 1, 35, 283_523),
    ],
)
def test_published_parameter_counts(task, layers, H, P, blocks, inputs, classes, published):
    with torch.device("meta"):
        one = [BidirectionalS5(H, d_state=P, blocks=blocks), nn.BatchNorm1d(H)]
        ends = [nn.Linear(inputs, H), nn.Linear(H, classes)]
    count = lambda modules: sum(p.numel() for m in modules for p in m.parameters())  # noqa: E731
    assert count(one) == layer_parameters(H, P, blocks)
    assert layers * count(one) + count(ends) == published
    with torch.device("meta"):
        assert count([S5(H, d_state=P, blocks=blocks)]) == layer_parameters(H, P, blocks) - P * H - 2 * H


@pytest.mark.parametrize("c_init", C_INITS)
def test_initial_statistics(c_init):
    H, P = 256, 128
    m = S5(H, d_state=P, blocks=4, c_init=c_init).double()
    small, _ = hippo.legs_diagonal(P // 4)
    want = small.repeat(4)
    assert torch.allclose(m.Lambda_re.detach(), want.real)
    assert_agree(m.Lambda_im.detach().float(), want.imag.float(), "Im Lambda")
    log_step = m.log_step.detach()
    rounding = 1 + 2 * torch.finfo(torch.float32).eps
    assert (log_step >= math.log(1e-3) * rounding).all()
    assert (log_step <= math.log(0.1) / rounding).all()
    # V is unitary, so rotation keeps variances: E|B~|^2 = 1/P and E|C~|^2 = the sum of both parts' variances.
    variance = {"trunc_standard_normal": 2 / P, "lecun_normal": 2 / (P * H), "complex_normal": 1.0}[c_init]
    for values, expected in ((m.B, 1 / P), (m.C, variance)):
        mean = values.detach().square().sum(-1).mean().item()
        # Five standard errors; a rotated real vector has up to twice the spread of a complex normal one.
        assert abs(mean / expected - 1) < 5 * math.sqrt(2 * 2 / (H * P / 2))


def test_b_is_a_real_matrix_seen_from_the_modes():
    m = S5(6, d_state=16, blocks=2).double()
    _, V, _ = hippo.legs_block_diagonal(16, 2)
    B = torch.view_as_complex(m.B.detach())
    real = 2 * (V @ B).real
    assert_agree((V.mH @ real.to(V.dtype)).to(torch.complex64), B.to(torch.complex64), "V* (2 Re V B)")
    assert not torch.equal(real[0], real[1])


def test_step_rescale():
    def error(steps: int) -> float:
        torch.manual_seed(2)
        step = 6 / steps
        m = bare(4, d_state=8, dt_min=step, dt_max=step)
        t = torch.linspace(0, 6, steps + 1, dtype=F64)
        x = torch.sin(t).reshape(1, -1, 1) * torch.arange(1, 5)
        fine = m(x)[:, ::2]
        m.rate = 2.0
        return ((m(x[:, ::2]) - fine).abs().max() / fine.abs().max()).item()

    # Zero-order hold of a smooth signal errs in proportion to the step.
    assert error(2000) < 0.6 * error(1000) < 0.6 * 0.6 * error(500)


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "dirac", "async"])
def test_irregular_steps_of_one_are_regular(rule):
    m = bare(3, d_state=8, discretization=rule)
    x, start = torch.randn(2, 20, 3, dtype=F64), torch.randn(2, 4, dtype=torch.complex128)
    y, state = m.extend_irregular(x, torch.ones(2, 20, dtype=F64), start)
    want, want_state = m.extend(x, start)
    assert_agree(y, want, "y", 20)
    assert_agree(state, want_state, "state", 20)


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "dirac", "async"])
def test_irregular_steps_are_the_recurrence_with_a_step_for_each_token(rule):
    m = bare(2, d_state=8, discretization=rule, step_rescale=1.5)
    x, elapsed = torch.randn(2, 15, 2, dtype=F64), 3 * torch.rand(2, 15, dtype=F64)
    elapsed[0, 4] = 0.0
    Lambda = m.Lambda_re.detach().numpy() + 1j * m.Lambda_im.detach().numpy()
    dt, B, C = 1.5 * np.exp(m.log_step.detach().numpy()), as_complex(m.B), as_complex(m.C)
    want = np.zeros((2, 15, 2))
    for row in range(2):
        h = np.zeros(4, complex)
        for t in range(15):
            since = elapsed[row, t].item() * dt
            z = Lambda * since
            held = (np.exp(Lambda * (dt if rule == "async" else since)) - 1) / Lambda
            a, gain = {
                "bilinear": lambda z=z, s=since: ((1 + z / 2) / (1 - z / 2), s / (1 - z / 2)),
                "dirac": lambda z=z: (np.exp(z), np.ones(4)),
            }.get(rule, lambda z=z, g=held: (np.exp(z), g))()
            u = x[row, t].numpy()
            h = a * h + gain * (B @ u)
            want[row, t] = 2 * (C @ h).real + m.D.detach().numpy() * u
    y, state = m.extend_irregular(x, elapsed)
    assert_agree(y, torch.from_numpy(want), "y", 15)
    # Cut in two, it is the same; and elapsed has a gradient.
    first, half = m.extend_irregular(x[:, :6], elapsed[:, :6])
    second, end = m.extend_irregular(x[:, 6:], elapsed[:, 6:], half)
    assert_agree(torch.cat([first, second], 1), y, "in two parts", 15)
    assert_agree(end, state, "state", 15)
    times = elapsed[:1, :4].clone().requires_grad_()
    torch.autograd.gradcheck(lambda t: m.extend_irregular(x[:1, :4], t)[0], times)


def test_irregular_samples_of_one_signal_agree():
    # A smooth signal read at random times: the finer the times, the closer to the same signal read regularly.
    def error(steps: int) -> float:
        torch.manual_seed(4)
        m = bare(2, d_state=8, dt_min=1.0, dt_max=1.0)  # elapsed is in units of time
        gaps = torch.rand(1, steps, dtype=F64) + 0.5
        gaps = 6 * gaps / gaps.sum()
        read = lambda t: torch.stack([torch.sin(t), torch.cos(2 * t)], -1)  # noqa: E731
        regular = torch.full((1, 20_000), 6 / 20_000, dtype=F64)
        ends = [m.extend_irregular(read(g.cumsum(1)), g)[1] for g in (gaps, regular)]
        return ((ends[0] - ends[1]).abs().max() / ends[1].abs().max()).item()

    assert error(1600) < 0.6 * error(800) < 0.6 * 0.6 * error(400)


def test_a_long_step_is_many_short_ones():
    # Held input: one step of three units is exactly three steps of one with the same value.
    m = bare(3, d_state=8)
    x = torch.randn(2, 1, 3, dtype=F64)
    _, once = m.extend_irregular(x, torch.full((2, 1), 3.0, dtype=F64))
    _, thrice = m.extend(x.expand(2, 3, 3), None)
    assert_agree(once, thrice, "state")
    _, same = m.extend_irregular(x, torch.zeros(2, 1, dtype=F64), once)
    assert torch.equal(same, once)


def test_events_at_one_time_add_up():
    m = bare(3, d_state=8, discretization="async")
    x, start = torch.randn(2, 2, 3, dtype=F64), torch.randn(2, 4, dtype=torch.complex128)
    elapsed = torch.tensor([[1.7, 0.0]] * 2, dtype=F64)
    _, state = m.extend_irregular(x, elapsed, start)
    _, summed = m.extend_irregular(x.sum(1, keepdim=True), elapsed[:, :1], start)
    assert_agree(state, summed, "state")


def test_irregular_steps_with_padding():
    m = bare(3, d_state=8)
    seg = Segments.from_lengths([4, 7], 7, side="left")
    x, elapsed = torch.randn(2, 7, 3, dtype=F64), torch.rand(2, 7, dtype=F64)
    y, state = m.extend_irregular(
        x.masked_fill(~seg.valid.unsqueeze(-1), torch.nan), elapsed.masked_fill(~seg.valid, torch.nan), seg=seg
    )
    want, want_state = m.extend_irregular(x[:1, 3:], elapsed[:1, 3:])
    assert_agree(y[:1, 3:], want, "y")
    assert_agree(state[:1], want_state, "state")
    assert (y[~seg.valid] == 0).all()
    with pytest.raises(ValueError, match=r"elapsed: want \(B, L\)"):
        m.extend_irregular(x, elapsed[:, :3])


def test_clipped_eigenvalues_keep_the_system_stable():
    x = torch.randn(1, 400, 3, dtype=F64)
    last = {}
    for clip in (False, True):
        m = bare(3, d_state=8, clip_eigs=clip, dt_min=0.1, dt_max=0.1)
        with torch.no_grad():
            m.Lambda_re.fill_(2.0)
        last[clip] = m.extend(x, None)[1].abs().max().item()
        assert (m.discrete()[0].real < 0).all() == clip
    assert last[True] < 100 < 1e20 < last[False]


def test_directions():
    m = BidirectionalS5(3, d_state=8, activation="none").double()
    with torch.no_grad():
        m.D.zero_()
    x = torch.zeros(1, 9, 3, dtype=F64)
    x[0, 4, 1] = 1.0
    both = m(x)[0]

    def only(C: str) -> torch.Tensor:
        other = BidirectionalS5(3, d_state=8, activation="none").double()
        other.load_state_dict(m.state_dict())
        with torch.no_grad():
            getattr(other, C).zero_()
        return other(x)[0]

    forward, backward = only("C2"), only("C1")
    assert (forward[:4] == 0).all()
    assert (backward[5:] == 0).all()
    assert (forward[4:] != 0).any(1).all()
    assert (backward[:5] != 0).any(1).all()  # the present token is in both
    assert_agree(both, forward + backward, "both")
    # Backward is forward on the reversed sequence.
    swapped = S5(3, d_state=8, activation="none").double()
    swapped.load_state_dict({**{k: v for k, v in m.state_dict().items() if k[0] != "C"}, "C": m.C2.data})
    assert_agree(backward, swapped(x.flip(1)).flip(1)[0], "backward")


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "dirac", "async"])
def test_both_directions_at_irregular_times(rule):
    m = BidirectionalS5(2, d_state=8, discretization=rule, activation="none").double()
    x, elapsed = torch.randn(2, 11, 2, dtype=F64), 2 * torch.rand(2, 11, dtype=F64)
    assert_agree(m.forward_irregular(x, torch.ones_like(elapsed)), m(x), "steps of one", 11)
    # One term for each pair of tokens: the gaps between them, whichever comes first; entered with its own gap.
    _, gain = m._steps(elapsed)
    into = gain * torch.einsum("pd,bld->blp", torch.view_as_complex(m.B), x + 0j)
    decay = {"bilinear": m._steps(elapsed)[0]}.get(rule, torch.complex(m.Lambda_re, m.Lambda_im) * m.log_step.exp()
                                                   * elapsed[..., None])  # fmt: skip
    total = decay.cumsum(1)
    between = total[:, :, None] - total[:, None]  # (B, t, s, P): from s to t
    forth = torch.where(torch.ones(11, 11).tril().bool()[..., None], between, -torch.inf).exp()
    back = torch.where(torch.ones(11, 11).triu().bool()[..., None], -between, -torch.inf).exp()
    C1, C2 = torch.view_as_complex(m.C1), torch.view_as_complex(m.C2)
    want = (
        2 * (torch.einsum("btsp,bsp,dp->btd", forth, into, C1) + torch.einsum("btsp,bsp,dp->btd", back, into, C2)).real
    )
    assert_agree(m.forward_irregular(x, elapsed), want + m.D * x, "pairs of tokens", 11)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_both_directions_at_irregular_times_with_padding(side):
    m = BidirectionalS5(3, d_state=8).double()
    valid = torch.ones(1, 9, dtype=torch.bool)
    valid[0, {"left": slice(0, 3), "right": slice(6, 9), "middle": slice(4, 7)}[side]] = False
    x, elapsed = torch.randn(1, 6, 3, dtype=F64), torch.rand(1, 6, dtype=F64)
    wide, gaps = torch.full((1, 9, 3), torch.nan, dtype=F64), torch.full((1, 9), torch.nan, dtype=F64)
    wide[valid], gaps[valid] = x[0], elapsed[0]
    y = m.forward_irregular(wide, gaps, Segments.from_valid(valid))
    assert_agree(y[valid], m.forward_irregular(x, elapsed)[0], "valid", 9)
    assert (y[~valid] == 0).all()
    # Two documents in a row do not see each other.
    seg = Segments.pack([[2, 4]])
    parts = [m.forward_irregular(x[:, a:b], elapsed[:, a:b]) for a, b in ((0, 2), (2, 6))]
    assert_agree(m.forward_irregular(x, elapsed, seg), torch.cat(parts, 1), "packed", 6)
    with pytest.raises(ValueError, match=r"BidirectionalS5: elapsed: want \(B, L\)"):
        m.forward_irregular(x, elapsed[:, :3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    m = S5(4, d_state=8, activation=activation).double()
    core = S5(4, d_state=8, activation="none").double()
    core.load_state_dict({k: v for k, v in m.state_dict().items() if not k.startswith("out")})
    x = torch.randn(2, 11, 4, dtype=F64)
    y = core(x)
    g = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    want = {
        "none": lambda: y,
        "gelu": lambda: g,
        "half_glu1": lambda: g * torch.sigmoid(m.out2(g)),
        "half_glu2": lambda: y * torch.sigmoid(m.out2(g)),
        "full_glu": lambda: m.out1(g) * torch.sigmoid(m.out2(g)),
    }[activation]()
    assert_agree(m(x), want, activation)
    m(x).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in m.parameters())


def test_dropout_is_shared_over_time():
    m = S5(64, d_state=4, dropout=0.5, activation="gelu")
    x = torch.randn(2, 30, 64)
    whole = m.eval()(x)
    kept = torch.where(whole == 0, torch.nan, m.train()(x) / whole)  # gelu itself may give zeros
    assert set(kept[~kept.isnan()].tolist()) == {0.0, 2.0}
    assert torch.equal(kept.nan_to_num(-1).amax(1), kept.nan_to_num(9).amin(1))


def test_precision():
    m = S5(4, d_state=8).double()
    y, state = m.extend(torch.randn(2, 9, 4, dtype=F64), m.init_state(2, dtype=F64))
    assert (y.dtype, state.dtype) == (F64, torch.complex128)
    m = S5(4, d_state=8, activation="none")
    x = torch.randn(2, 50, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = m(x)
    assert torch.equal(got, m(x))
    y, state = m.bfloat16().extend(x.bfloat16(), None)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.complex64)


def test_capabilities():
    assert issubclass(S5, HasImpulse)
    assert issubclass(BidirectionalS5, SequenceMixer)
    assert not hasattr(BidirectionalS5, "extend")
    assert {name for name, _ in S5(4, d_state=8).named_parameters()} >= S5.dynamics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c_init": "lecun"}, "unknown c_init 'lecun'"),
        ({"activation": "half_glu3"}, "did you mean 'half_glu"),
        ({"discretization": "euler"}, "unknown discretization"),
        ({"d_state": 7}, "d_state: want an even number"),
        ({"blocks": 3}, "blocks: want 2 \\* blocks to divide d_state = 64, got 3"),
        ({"step_rescale": -1.0}, "step_rescale: want a positive"),
        ({"dropout": 1.5}, "dropout: want"),
    ],
)
def test_errors(options, message):
    for mixer in (S5, BidirectionalS5):
        with pytest.raises(ValueError, match=message):
            mixer(4, **options)
