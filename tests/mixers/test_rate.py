"""Mixers whose steps are time read an input that is sampled at another rate."""

from __future__ import annotations

import math

import pytest
import torch

from statewise import mixers
from statewise.models.classification import SequenceClassifier
from statewise.testing import assert_agree

RATED = [name for name in mixers.names() if issubclass(mixers.mixer_class(name), mixers.HasRate)]


def test_which_mixers_have_a_rate():
    assert {"s4", "bidirectional_s4", "s4d", "bidirectional_s4d", "s5", "bidirectional_s5", "s4ptd", "s5ptd"} == {
        *RATED
    }


@pytest.mark.parametrize("name", RATED)
def test_a_rate_is_a_factor_on_every_step(name):
    mixer = mixers.create(name, 4, d_state=4).double()
    other = mixers.create(name, 4, d_state=4).double()
    other.load_state_dict(mixer.state_dict())
    mixer.rate = 3.0
    with torch.no_grad():
        getattr(other, "log_step" if hasattr(other, "log_step") else "log_dt").add_(math.log(3.0))
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    assert_agree(mixer(x), other(x), name, 9)


@pytest.mark.parametrize("name", RATED)
def test_half_of_a_smooth_input(name):
    """What is left of a smooth input is understood at half the rate, and not at the old one."""
    torch.manual_seed(0)
    mixer = mixers.create(name, 4, d_state=4, dt_min=0.005, dt_max=0.02).double()
    t = torch.linspace(0, 12, 801, dtype=torch.float64)
    x = torch.stack([torch.sin(t + p) for p in range(4)], -1)[None]
    want = mixer(x)[:, ::2]
    unchanged = (mixer(x[:, ::2]) - want).norm()
    mixers.scale_rate(mixer, 2.0)
    assert (mixer(x[:, ::2]) - want).norm() < 0.15 * unchanged


def test_mixers_made_of_mixers():
    both = mixers.create("bidirectional", 4, mixer={"name": "s4d", "d_state": 4})
    side = mixers.create("parallel", 4, mixers=[{"name": "s5", "d_state": 4}, {"name": "s4", "d_state": 4}])
    tied = mixers.create("bidirectional", 4, mixer={"name": "s4d", "d_state": 4}, tied=True)
    for made in (both, side, tied):
        mixers.scale_rate(made, 2.0)
        mixers.scale_rate(made, 2.0)
        assert {m.rate for m in made.modules() if isinstance(m, mixers.HasRate)} == {4.0}


@pytest.mark.parametrize("name", ["mamba", "bidirectional_attention", "lstm", "liquid_s4"])
def test_mixers_that_count_tokens_are_refused_and_nothing_is_changed(name):
    model = SequenceClassifier(2, 4, 2, channels=1, mixer=["s4d", name])
    with pytest.raises(ValueError, match=f"rate: {type(model.layers[1].part).__name__} offers none"):
        model.at_sampling_rate(0.5)
    assert model.layers[0].part.rate == 1.0
    with pytest.raises(ValueError, match="factor: want a positive number, got 0"):
        mixers.scale_rate(model.layers[0], 0)


def test_a_classifier_at_half_the_rate_is_saved_with_it(tmp_path):
    from statewise import load

    model = SequenceClassifier(2, 8, 2, channels=1, mixer=["s4d", "bidirectional_s5"], norm="batch").eval()
    half = model.at_sampling_rate(0.5)
    assert [layer.part.rate for layer in half.layers] == [2.0, 2.0]
    assert [layer.part.rate for layer in model.layers] == [1.0, 1.0]
    assert (half.config["sampling_rate"], model.config["sampling_rate"]) == (0.5, 1.0)
    half.save_pretrained(tmp_path)
    x = torch.randn(3, 20, 1)
    assert torch.equal(load(tmp_path)(x), half(x))
    assert not torch.equal(half(x), model(x))
    assert half.at_sampling_rate(2.0).config["sampling_rate"] == 1.0
    assert torch.equal(half.at_sampling_rate(2.0)(x), model(x))
    for options, message in (({}, "sampling_rate: want a positive number, got 0"), ({"positions": True}, "positions")):
        with pytest.raises(ValueError, match=message):
            SequenceClassifier(2, 8, 1, channels=1, **options).at_sampling_rate(0 if not options else 0.5)


def test_a_mixer_in_two_places_is_changed_once():
    mixer = mixers.create("s4d", 8, d_state=4)
    mixers.scale_rate(torch.nn.ModuleList([torch.nn.Sequential(mixer), torch.nn.Sequential(mixer)]), 2.0)
    assert mixer.rate == 2.0
