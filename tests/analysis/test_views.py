"""Matrices, responses, spectra, memory and states against what is known of them, and on mixers made here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from statewise import Segments, analysis, mixers
from statewise.analysis.spectra import _linearised
from statewise.mixers.base import CausalMixer, HasImpulse
from statewise.models.language import LanguageModel
from statewise.testing import assert_agree

D, L = 4, 11


def build(name, **options):
    torch.manual_seed(0)
    return mixers.create(name, D, **options).double().eval()


def draw(rows=1, length=L):
    return torch.randn(rows, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TanhRNN(CausalMixer):
    """h_t = tanh(W h_{t-1} + U x_t), y = h: a nonlinear mixer with no matrix."""

    def __init__(self):
        super().__init__()
        self.W, self.U = (nn.Parameter(torch.randn(D, D, dtype=torch.float64) / 2) for _ in range(2))

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32):
        return torch.zeros(batch, D, dtype=dtype)

    def _run(self, x, state, seg):
        h = x.new_zeros(len(x), D) if state is None else state
        ys = []
        for t in range(x.shape[1]):
            h = torch.tanh(h @ self.W.mT + x[:, t] @ self.U.mT)
            ys.append(h)
        return torch.stack(ys, 1), h


# ---- matrices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mamba", {"d_state": 3}),
        ("mamba2", {"d_state": 3, "head_dim": 2}),
        ("s4d", {"d_state": 4}),
        ("rglru", {}),
        ("qlstm", {}),
        ("attention", {"n_heads": 2}),
        ("linear_attention", {"n_heads": 2}),
    ],
)
def test_some_heads_are_those_of_all(name, options):
    mixer, x, seg = build(name, **options), draw(2), Segments.pack([[3, 8], [9]])
    every = analysis.mixing_matrices(mixer, x, seg, row=1)
    assert_agree(every.dense, mixer.matrix(x, seg)[1].detach(), "matrix", L)
    some = analysis.mixing_matrices(mixer, x, seg, row=1, heads=[1, 0])
    assert (some.heads, some.total) == ((1, 0), len(every.dense))
    assert_agree(some.dense, every.dense[[1, 0]], "two heads", L)
    assert analysis.mixing_matrices(mixer, x, seg, heads=1).heads == (0,)
    assert analysis.mixing_matrices(mixer, x, seg, row=0).starts == (3,)
    with pytest.raises(ValueError, match="heads: want 0 to"):
        analysis.mixing_matrices(mixer, x, heads=[99])


def test_a_matrix_that_mixes_channels_is_shown_by_its_norm():
    mixer, x = build("s5", d_state=4), draw()
    view = analysis.mixing_matrices(mixer, x)
    assert_agree(view.dense[0], mixer.matrix(x)[0].detach().square().sum((-1, -2)).sqrt(), "norm", L)


def test_figures_of_a_matrix():
    def figures(dense):
        view = analysis.MixingMatrices(torch.tensor(dense)[None].double(), (0,), 1, (), "")
        return [t.item() for t in (view.mean_lag, view.diagonal_share, view.rank)]

    assert figures([[1, 0], [0, 1]]) == pytest.approx([0, 1, 2])
    assert figures([[0, 0], [-1, 0]]) == pytest.approx([1, 0, 1])
    assert figures([[1, 0], [1, 0]]) == pytest.approx([0.5, 0.5, 1])
    assert figures([[0, 0], [0, 0]]) == pytest.approx([0, 0, 1])


def test_no_matrix_of_a_nonlinear_mixer():
    with pytest.raises(TypeError, match=r"TanhRNN has no matrix.*analysis.memory"):
        analysis.mixing_matrices(TanhRNN(), draw())
    with pytest.raises(ValueError, match="row: want 0 to 0, got 1"):
        analysis.mixing_matrices(build("s4d"), draw(), row=1)


# ---- responses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("s4d", {"d_state": 4, "init": "lin"}),
        ("s5", {"d_state": 4}),
        ("s4", {"d_state": 4}),
        ("s4", {"d_state": 4, "rank": 3}),
    ],
)
def test_transfer_function_is_the_transform_of_the_impulse_response(name, options):
    mixer = build(name, dt_min=0.5, dt_max=1.0, **options)
    if name == "s4":  # let all of P count
        nn.init.normal_(mixer.P)
    view = analysis.transfer_function(mixer, frequencies=65)
    taps = analysis.impulse_response(mixer, 4096).taps  # modes of exp(-0.25) or less per token: nothing is left
    assert view.exact
    want = torch.fft.rfft(taps)[:, :: 2048 // 64]
    assert_agree(view.gain, want.detach(), "transfer", 4096)
    assert view.omega[-1] == math.pi


def test_transfer_function_without_a_diagonal_form():
    class Hidden(mixers.S4D):
        discrete = None

        def impulse(self, length):
            return torch.tensor([[1.0, 0.5]], dtype=torch.float64).repeat(D, length)[:, :length] * (
                torch.arange(length) < 2
            )

    view = analysis.transfer_function(Hidden(D), frequencies=9, length=8)
    assert not view.exact
    assert_agree(view.gain[0], 1 + 0.5 * torch.exp(-1j * view.omega), "two taps", 8)
    assert analysis.lti.diagonal_form(Hidden(D)) is None


def test_reach_of_a_response():
    view = analysis.ImpulseResponse(torch.tensor([[0.0, 3.0, 4.0, 0.0], [1.0, 0, 0, 0]]), "")
    assert view.energy.tolist() == [25, 1]
    assert [view.reach(s).tolist() for s in (0.3, 0.36, 0.5, 1.0)] == [[2, 1], [2, 1], [3, 1], [3, 1]]
    with pytest.raises(ValueError, match="share: want 0 < share <= 1, got 0"):
        view.reach(0)


def test_responses_are_of_time_invariant_mixers():
    for view in (analysis.transfer_function, lambda m: analysis.impulse_response(m, 3)):
        with pytest.raises(TypeError, match="Mamba is not causal and time-invariant"):
            view(build("mamba"))
    with pytest.raises(ValueError, match="length: want at least 1 token, got 0"):
        analysis.impulse_response(build("s4d"), 0)


# ---- spectra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("s4d", {"d_state": 6}), ("s5", {"d_state": 6})])
def test_spectrum_of_time_invariant_mixers(name, options):
    mixer = build(name, **options)
    view, log_a = analysis.spectrum(mixer), mixer.discrete()[0].detach()
    assert view.source == "time-invariant"
    assert_agree(view.continuous, log_a.reshape(view.eigenvalues.shape), "continuous")
    assert_agree(view.time_scales, -1 / log_a.real.reshape(view.eigenvalues.shape), "time scales")
    assert view.unstable_share == 0


def assert_same_set(got, want, what):
    """Eigenvalues without their order: each has a partner on the other side, up to rounding."""
    distance = (got[:, None] - want).abs()
    for nearest in (distance.min(0).values, distance.min(1).values):
        assert_agree(nearest + 1, torch.ones_like(nearest), what)


def test_spectrum_of_s4_is_that_of_hippo():
    """LegS has the eigenvalues -1, -2, ..., -N, and the bilinear rule maps them as it maps the matrix."""
    mixer = build("s4", d_state=4)
    mixer.reset_dynamics()  # again, now in float64
    view = analysis.spectrum(mixer)
    assert (view.source, view.eigenvalues.shape) == ("time-invariant", (D, 4))
    half = mixer.log_dt.detach().exp().unsqueeze(-1) * torch.arange(1, 5) / 2
    for got, want in zip(view.eigenvalues, (1 - half) / (1 + half)):
        assert_same_set(got, want, "eigenvalues")
    assert view.unstable_share == 0
    # They are also those of the derivative of the state.
    assert_same_set(view.eigenvalues.flatten(), _linearised(mixer, draw(), samples=1)[0], "linearised")


@pytest.mark.parametrize(
    ("two", "one"), [("bidirectional_s4", "s4"), ("bidirectional_s4d", "s4d"), ("bidirectional_s5", "s5")]
)
def test_two_directions_have_the_spectrum_of_one(two, one):
    both, alone = build(two, d_state=4), build(one, d_state=4)
    own = {k: v for k, v in both.state_dict().items() if k in alone.dynamics}
    alone.load_state_dict(own, strict=False)
    view = analysis.spectrum(both)
    assert view.source == "time-invariant"
    assert torch.equal(view.eigenvalues, analysis.spectrum(alone).eigenvalues)


class Mean(CausalMixer, HasImpulse):
    """The mean of two neighbours: time-invariant, in a form that nothing here knows."""

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32):
        return torch.zeros(batch, D, dtype=dtype)

    def _run(self, x, state, seg):
        before = torch.cat([(x.new_zeros(len(x), D) if state is None else state).unsqueeze(1), x], 1)
        return (before[:, 1:] + before[:, :-1]) / 2, before[:, -1]

    def mixing(self, x, seg=None):
        raise NotImplementedError

    def impulse(self, length):
        return torch.nn.functional.pad(torch.full((D, 2), 0.5), (0, length - 2))


def test_a_time_invariant_mixer_of_no_known_form_is_linearised():
    with pytest.raises(ValueError, match="the dynamics of Mean have no closed form that is known here; want a sample"):
        analysis.spectrum(Mean())
    view = analysis.spectrum(Mean(), draw())
    assert view.source == "linearised"
    assert (view.eigenvalues == 0).all()  # it forgets all but the last input at once


def test_spectrum_of_a_selective_mixer_is_a_sample():
    mixer, x = build("rglru"), draw(2)
    seg = Segments.from_lengths([5, 9], total=L)
    view = analysis.spectrum(mixer, x, seg)
    assert view.source == "input-dependent"
    decay = analysis.to_dsf(mixer, x, seg).decay[..., 0, 0].detach()
    want = torch.cat([decay[0, 1:5], decay[1, 1:9]]).mT  # neither padding nor the first token of a row
    assert_agree(view.eigenvalues, want, "decays")
    low, high = view.quantiles((0.0, 1.0))
    assert low == pytest.approx(-1 / math.log(want.min()))
    assert high == pytest.approx(-1 / math.log(want.max()))


@pytest.mark.parametrize(
    ("name", "options"), [("rglru", {"d_conv": 1}), ("s4d", {"d_state": 4}), ("s5", {"d_state": 4})]
)
def test_linearised_dynamics_are_the_decays_of_a_linear_mixer(name, options):
    mixer, x = build(name, **options), draw()
    got = _linearised(mixer, x, samples=L)
    decay = analysis.to_dsf(mixer, x).decay.detach()
    decay = decay.expand(1, L, *decay.shape[2:])[0].flatten(1)
    if decay.is_complex():  # numbers of state come as pairs of reals, and with them the conjugates
        decay = torch.cat([decay, decay.conj()], 1)
    for now, want in zip(got, decay.to(got.dtype)):
        assert_same_set(now, want, "eigenvalues")


def test_quantiles_of_time_scales_are_the_usual_ones():
    scales = torch.tensor([1.0, 2.0, 5.0, 11.0], dtype=torch.float64)
    view = analysis.Spectrum(torch.exp(-1 / scales)[None], "time-invariant", "four")
    assert view.quantiles((0.0, 0.5, 0.9, 1.0)) == pytest.approx([1.0, 3.5, 9.2, 11.0])
    endless = analysis.Spectrum(torch.tensor([[0.5, 0.9, 1.0, 1.0]]), "time-invariant", "half of it stays")
    assert endless.quantiles((0.5, 0.8)) == [math.inf, math.inf]


def test_linearised_dynamics_of_a_nonlinear_mixer():
    mixer, x = TanhRNN(), draw()
    view = analysis.spectrum(mixer, x)
    assert view.source == "linearised"
    h = mixer(x)[0].detach()
    slope = torch.diag(1 - h[-1] ** 2) @ mixer.W.detach()
    want = torch.linalg.eigvals(slope)
    assert_same_set(view.eigenvalues[-1], want, "eigenvalues")


def test_what_has_no_spectrum_says_why():
    with pytest.raises(ValueError, match="the dynamics of Mamba depend on the input"):
        analysis.spectrum(build("mamba"))
    with pytest.raises(TypeError, match="want a causal mixer, which has a state, got Bidirectional"):
        analysis.spectrum(build("bidirectional", mixer="s4d"), draw())
    both = build("parallel", mixers=["s4d", {"name": "attention", "n_heads": 1}])
    with pytest.raises(TypeError, match="the state of Parallel keeps its inputs as they are and only grows"):
        analysis.spectrum(both, draw())
    with pytest.raises(ValueError, match=r"Parallel has 2\d* numbers of state; want at most"):
        analysis.spectrum(build("parallel", mixers=[{"name": "s4d", "d_state": 600}]), draw())


def test_a_growing_mode_is_unstable():
    mixer = build("s4d", d_state=4, real_transform="none")
    with torch.no_grad():
        mixer.A_real[0, 0] = 1.0
    view = analysis.spectrum(mixer)
    assert view.unstable_share == 1 / 8
    assert torch.isinf(view.time_scales).sum() == 1


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_of_a_linear_mixer_is_the_norm_of_its_taps():
    mixer = build("s4d", d_state=4, activation="none", glu=False)
    view = analysis.memory(mixer, draw(2), probes=None)
    taps = mixer.impulse(L).detach()
    assert view.lags.tolist() == list(range(L))
    assert_agree(view.curve, taps.square().sum(0).sqrt(), "curve", L)
    part = view.curve.cumsum(0) / view.curve.sum()
    assert view.half_life == int((part < 0.5).sum()) + 1
    assert view.reach(1.0) == L


def test_memory_is_the_norm_of_derivatives():
    mixer, x = build("mamba", d_state=3), draw()
    view = analysis.memory(mixer, x, probes=None, positions=3)
    assert view.positions.tolist() == [5, 8, 10]
    whole = torch.autograd.functional.jacobian(mixer, x)[0, :, :, 0]  # (t, D, s, D)
    want = whole.square().sum((1, 3)).sqrt()[view.positions]
    assert_agree(view.influence, want, "influence", L)


def test_random_directions_estimate_the_norm():
    mixer, x = build("mamba2", d_state=3, head_dim=4), draw()
    exact = analysis.memory(mixer, x, probes=None)
    many = analysis.memory(mixer, x, probes=3)
    assert many.influence.shape == exact.influence.shape
    assert 0.5 < (many.influence.sum() / exact.influence.sum()).item() < 2
    assert torch.equal(many.influence, analysis.memory(mixer, x, probes=3).influence)
    assert not torch.equal(many.influence, analysis.memory(mixer, x, probes=3, seed=1).influence)


def test_memory_sees_the_future_where_there_is_one():
    x = draw()
    ahead = analysis.memory(build("bidirectional", mixer="s4d"), x, probes=None)
    assert ahead.looks_ahead
    # Outputs all over the input, so that both sides are seen as far.
    assert ahead.positions.tolist() == list(range(L))
    assert ahead.lags.tolist() == list(range(1 - L, L))
    # The Fourier transform of S4D leaves rounding in the future, which is none.
    assert not analysis.memory(build("s4d"), x.float().double()).looks_ahead
    assert not analysis.memory(nn.Sequential(build("s4d")), x).looks_ahead


def test_memory_of_a_language_model():
    torch.manual_seed(0)
    model = LanguageModel(17, 8, 2, mixer={"name": "mamba2", "d_state": 3, "head_dim": 4}).double().eval()
    tokens = torch.randint(17, (1, L))
    view = analysis.memory(model, tokens, probes=None, positions=2)

    def read(embedded):
        return model.head(model.trunk(embedded, None, None)[0])

    whole = torch.autograd.functional.jacobian(read, model.embed(tokens).detach())[0, :, :, 0]
    assert_agree(view.influence, whole.square().sum((1, 3)).sqrt()[view.positions], "influence", L)
    assert not model.embedding._forward_hooks
    seg = Segments.pack([[6, 5]])
    apart = analysis.memory(model, tokens, seg, probes=2)
    assert (apart.influence[apart.positions >= 6][:, :6] == 0).all()


def test_memory_wants_an_output_for_each_position():
    class Pooled(nn.Module):
        def forward(self, x):
            return x.mean(1)

    with pytest.raises(ValueError, match=r"want an output for each position, \(B, L, ...\), got \(\d+, 4\)"):
        analysis.memory(Pooled(), draw())
    with pytest.raises(ValueError, match=r"want an nn\.Embedding of the tokens"):
        analysis.memory(nn.Identity(), torch.zeros(1, 3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="positions, probes: want at least 1, got 0 and 4"):
        analysis.memory(build("s4d"), draw(), positions=0)


# ---- states and inputs -----------------------------------------------------------------------------------------------


def test_norms_of_states():
    mixer, x = build("rglru"), draw(2)
    view = analysis.state_norms(mixer, x)
    assert view.names == ("conv", "h")
    state = mixer.extend(x, mixer.init_state(2, dtype=torch.float64))[1]
    assert_agree(view.norms[1, -1], state.h.detach().norm(dim=1).mean(), "norm at the end", L)
    assert view.sizes[:, -1].tolist() == [3 * D, D]
    growing = analysis.state_norms(build("attention", n_heads=1), x)
    assert growing.sizes[0].tolist() == [D * (t + 1) for t in range(L)]
    with pytest.raises(TypeError, match="want a causal mixer or model"):
        analysis.state_norms(build("bidirectional", mixer="s4d"), x)


def test_mixers_of_a_model_and_what_they_see():
    torch.manual_seed(0)
    parts = ["s4d", {"name": "parallel", "mixers": ["s5", "s4d"]}]
    model = LanguageModel(17, 8, 4, mixer=parts).double().eval()
    found = analysis.sequence_mixers(model)
    assert [name for name, _ in found] == [f"layers.{i}.mixer" for i in range(4)]
    assert analysis.sequence_mixers(found[0][1]) == [("", found[0][1])]
    tokens, seg = torch.randint(17, (1, L)), Segments.pack([[6, 5]])
    seen = analysis.mixer_input(model, found[1][1], tokens, seg)
    stream, _ = model.layers[0]._run(model.embed(tokens), None, seg)
    assert_agree(seen.x, model.layers[1].norm(stream).detach(), "input of the second mixer", L)
    assert seen.seg is seg
    assert "_run" not in vars(found[1][1]), "nothing is left behind"


def test_input_of_a_mixer_that_looks_ahead():
    both, x = build("bidirectional", mixer="s4d"), draw()
    model = nn.Sequential(nn.Linear(D, D).double(), both)
    assert_agree(analysis.mixer_input(model, both, x).x, model[0](x).detach(), "input", L)
    assert not both._forward_pre_hooks
    with pytest.raises(ValueError, match="Sequential does not call this S4D"):
        analysis.mixer_input(nn.Sequential(), build("s4d"), x)
