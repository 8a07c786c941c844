"""Every mixer with a matrix as a dynamical system: native, recurrent and dense evaluation agree to 1e-10 in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from statewise import Segments, mixers
from statewise.analysis.dsf import taylor_dsf, to_dsf
from statewise.analysis.lti import diagonal_form
from statewise.mixers.base import Causal, HasImpulse, HasMixing

D, L = 6, 12
# Issue and sheet name this bound.
BOUND = 1e-10
OPTIONS = {
    "attention": [
        {"n_heads": 3},
        {"n_heads": 2, "rope": False, "window": 4, "d_conv": 2},
        {"head_dim": 4, "n_heads": 4, "n_kv_heads": 2},
    ],
    "linear_attention": [{"n_heads": 2}, {"key_dim": 3, "feature_map": "taylor", "d_conv": 2}],
    "normalized_attention": [{}, {"n_heads": 2}],
    "mamba": [{"d_state": 3}],
    "mamba2": [
        {"d_state": 3, "head_dim": 4},
        {"d_state": 3, "head_dim": 3, "n_groups": 2, "dt_limit": (0.01, 0.1)},
    ],
    "s4d": [{"d_state": 4}, {"d_state": 4, "discretization": "bilinear", "glu": False, "n_ssm": 2}],
    "s5": [{"d_state": 4}],
}


def causal_with_matrix():
    return [
        n
        for n in mixers.names()
        if issubclass(mixers.mixer_class(n), HasMixing) and issubclass(mixers.mixer_class(n), Causal)
    ]


CASES = [
    pytest.param(name, options, id=f"{name}-{options}")
    for name in causal_with_matrix()
    for options in OPTIONS.get(name, [{}])
]


def build(name, options):
    torch.manual_seed(0)
    mixer = mixers.create(name, D, **options).double().eval()
    return mixer, torch.randn(2, L, D, dtype=torch.float64)


def close(got, want):
    return (got - want).abs().max() <= BOUND * want.abs().max()


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed and padded"])
@pytest.mark.parametrize(("name", "options"), CASES)
@torch.no_grad()
def test_three_evaluations_agree(name, options, packed):
    mixer, x = build(name, options)
    seg = None
    if packed:
        valid = torch.ones(2, L, dtype=torch.bool)
        valid[0, :2] = valid[1, 6] = valid[1, 10:] = False
        position = torch.tensor([[0, 0, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 0, 6, 0, 1, 0, 0]])
        seg = Segments(position, valid)
    native = mixer(x, seg)
    system = to_dsf(mixer, x, seg)
    assert close(system.emit(system.recurrence()), native)
    assert close(system.emit(system.apply(system.matrix())), native)


@pytest.mark.parametrize(("name", "options"), CASES)
@torch.no_grad()
def test_the_dense_form_is_the_same_system(name, options):
    mixer, x = build(name, options)
    system = to_dsf(mixer, x)
    dense = system.dense()
    values = system.v.flatten(2)
    assert dense.decay.shape[2:] == dense.B.shape[2:3] == dense.C.shape[3:]
    assert dense.B.shape[3] == dense.C.shape[2] == values.shape[2]
    assert close(dense.run(values), system.recurrence().flatten(2))


@pytest.mark.parametrize("name", [n for n in causal_with_matrix() if issubclass(mixers.mixer_class(n), HasImpulse)])
def test_time_invariant_mixers_say_so(name):
    mixer, x = build(name, OPTIONS.get(name, [{}])[0])
    if diagonal_form(mixer) is not None:
        assert to_dsf(mixer, x).time_invariant


def test_what_has_no_matrix_is_refused():
    both = mixers.create("bidirectional", D, mixer="s4d")
    with pytest.raises(TypeError, match=r"Bidirectional looks ahead.*analysis.memory"):
        to_dsf(both, torch.zeros(1, 3, D))
    with pytest.raises(TypeError, match="Parallel is not linear in its values"):
        to_dsf(mixers.create("parallel", D, mixers=["s4d"]), torch.zeros(1, 3, D))


# ---- attention -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_taylor_series_of_softmax_converges():
    """About ten times as near with each order, for queries and keys ~ N(0, 0.3^2) of width 6."""
    torch.manual_seed(1)
    mixer = mixers.create("attention", 6, n_heads=1, rope=False, scale=1.0).double()
    x = torch.randn(1, 32, 6, dtype=torch.float64)
    for projection in (mixer.q_proj, mixer.k_proj):
        projection.weight.mul_(0.3 / projection(x).std())
    native = mixer(x)
    errors = []
    for order in range(1, 9):
        system = taylor_dsf(mixer, x, order)
        assert system.expansion == math.comb(6 + order, order)
        approximate = system.emit(system.recurrence())
        assert close(system.emit(system.apply(system.matrix())), approximate)
        errors.append(((approximate - native).abs().max() / native.abs().max()).item())
    assert all(later < 0.5 * earlier for earlier, later in pairwise(errors)), errors
    assert errors[0] > 1e-3, "the first order is far from exact"
    assert errors[-1] < 1e-6 * errors[0], errors


@torch.no_grad()
def test_softmax_needs_a_slot_for_each_token():
    mixer, x = build("attention", {"n_heads": 2, "rope": False})
    system = to_dsf(mixer, x)
    assert system.expansion == L
    # Lambda is the quotient of normalisers; large scores do no harm.
    mixer.q_proj.weight.mul_(1e3)
    system = to_dsf(mixer, x)
    assert close(system.emit(system.recurrence()), mixer(x))


def test_taylor_wants_attention_without_a_window():
    with pytest.raises(ValueError, match="window = 3"):
        taylor_dsf(mixers.create("attention", 4, n_heads=1, window=3), torch.zeros(1, 4, 4), 2)
    with pytest.raises(TypeError, match="want Attention, got S4D"):
        taylor_dsf(mixers.create("s4d", 4), torch.zeros(1, 4, 4), 2)


@pytest.mark.parametrize("level", [0.0, 600.0, -600.0])
@torch.no_grad()
def test_normalised_attention_stays_finite_where_its_normaliser_is_large(level):
    """exp(600) squared is no number: only differences of the exponents may be taken."""
    mixer, x = build("normalized_attention", {"n_heads": 2})
    mixer.n_proj.bias.fill_(level)
    system = to_dsf(mixer, x)
    assert torch.isfinite(system.decay).all()
    native = mixer.mixing(x).apply()
    assert torch.isfinite(native).all()
    assert close(system.recurrence(), native)


@torch.no_grad()
def test_linear_attention_is_a_gated_system():
    """The quotient of normalisers is one gate a head, as in a scalar-gated state space model."""
    mixer, x = build("linear_attention", {"n_heads": 2})
    system = to_dsf(mixer, x)
    assert system.decay.shape[3:] == (1, 1)
    # The sum of positive scores of one query depends on the query, so a quotient may exceed one, but not be negative.
    assert (system.decay > 0).all()


# ---- gates -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_reversed_sigmoid_is_the_decay_of_a_state_space_model():
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    for a in (0.0, 0.3, 1.0, 7.0):
        decay = torch.exp(-a * torch.nn.functional.softplus(x))
        assert close(torch.sigmoid(-x) ** a, decay)


@torch.no_grad()
def test_the_exponent_of_the_reversed_gate():
    mixer, x = build("qlstm", {})
    assert mixer.alpha == 1
    mixer.alpha.fill_(0)
    assert (to_dsf(mixer, x).decay == 1).all(), "a pure integrator"
    mixer.alpha.fill_(-2)
    assert (to_dsf(mixer, x).decay == 1).all(), "clamped at zero"
    mixer.alpha.fill_(2)
    squared = to_dsf(mixer, x).decay
    mixer.alpha.fill_(1)
    assert close(squared, to_dsf(mixer, x).decay ** 2)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "expansion", "size"),
    [
        ("mamba", {"d_state": 16, "expand": 2}, 16, 16 * 12),
        ("mamba2", {"d_state": 8, "head_dim": 4, "expand": 2}, 8, 8 * 12),
        ("rglru", {"d_rnn": 10, "n_blocks": 2}, 1, 10),
        ("qlstm", {"expand": 2}, 1, 12),
        ("s4d", {"d_state": 4}, 4, 4 * 6),
        ("s5", {"d_state": 12}, 2, 12),
        ("normalized_attention", {"n_heads": 2, "key_dim": 5}, 5, 5 * 6),
        ("linear_attention", {"n_heads": 2, "key_dim": 5}, 5, 5 * 6),
        ("linear_attention", {"key_dim": 3, "feature_map": "taylor"}, 10, 10 * 6),
        ("attention", {"n_heads": 2, "rope": False}, L, L * 6),
    ],
)
def test_state_size(name, options, expansion, size):
    system = to_dsf(*build(name, options))
    assert (system.expansion, system.state_size) == (expansion, size)
