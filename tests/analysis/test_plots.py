"""Every view has a picture, also where it is extreme, and no picture touches pyplot."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from statewise import Segments, analysis, mixers
from statewise.models.language import LanguageModel

D, L = 8, 24


def build(name, **options):
    torch.manual_seed(0)
    return mixers.create(name, D, **options).eval()


def draw():
    return torch.randn(1, L, D, generator=torch.Generator().manual_seed(0))


def zeros(mixer):
    with torch.no_grad():
        for p in mixer.parameters():
            p.zero_()
    return mixer


PICTURES = {
    "matrices with documents": lambda: analysis.plot_matrices(
        analysis.mixing_matrices(build("mamba"), draw(), Segments.pack([[9, 15]]))
    ),
    "matrices of nothing": lambda: analysis.plot_matrices(
        analysis.mixing_matrices(zeros(build("normalized_attention")), draw())
    ),
    "impulse": lambda: analysis.plot_impulse(analysis.impulse_response(build("s4d"), 50), [3, 1]),
    "impulse of one tap": lambda: analysis.plot_impulse(analysis.impulse_response(build("s5"), 1)),
    "transfer": lambda: analysis.plot_transfer(analysis.transfer_function(build("s5", d_state=4))),
    "spectrum, turning": lambda: analysis.plot_spectrum(analysis.spectrum(build("s4d"))),
    "spectrum, few heads": lambda: analysis.plot_spectrum(analysis.spectrum(build("mamba2", head_dim=8), draw())),
    "spectrum, many channels": lambda: analysis.plot_spectrum(analysis.spectrum(build("qlstm", expand=3), draw())),
    "spectrum, nothing decays": lambda: analysis.plot_spectrum(
        analysis.spectrum(zeros(build("normalized_attention")), draw())
    ),
    "memory of several": lambda: analysis.plot_memory(
        [analysis.memory(build(n), draw()) for n in ("s4d", "mamba", "bidirectional_s5")]
    ),
    "memory of nothing": lambda: analysis.plot_memory(analysis.memory(zeros(build("s4d")), draw())),
    "influence": lambda: analysis.plot_influence(analysis.memory(build("bidirectional", mixer="s4d"), draw())),
    "states": lambda: analysis.plot_states(
        analysis.state_norms(LanguageModel(9, D, 4, mixer={"name": "mamba2", "head_dim": 8}), torch.randint(9, (1, L)))
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name, tmp_path):
    figure = PICTURES[name]()
    file = tmp_path / "m.png"
    analysis.save(figure, file)
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert figure.get_suptitle()
    for axes in figure.axes:
        if axes.axison and axes.get_subplotspec() is not None and axes.get_label() != "<colorbar>":
            assert axes.has_data() or axes.texts, name
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("name", ["bidirectional", "s4d"])
def test_an_influence_is_as_high_as_its_outputs(name):
    axes = analysis.plot_influence(analysis.memory(build(name, **LOOKS[name]), draw())).axes[0]
    assert axes.get_aspect() == 1
    bottom, top = axes.get_ylim()
    assert (top, bottom) == (-0.5 if name == "bidirectional" else L // 2 - 0.5, L - 0.5)
    assert axes.get_xlim() == (-0.5, L - 0.5)


LOOKS = {"bidirectional": {"mixer": "s4d"}, "s4d": {}}


def test_pairs_of_an_input_and_an_output_are_named():
    view = analysis.impulse_response(build("s5", d_state=4), 20)
    assert view.inputs == D
    left, right = analysis.plot_impulse(view).axes
    lines = {line.get_label(): line.get_ydata() for line in left.get_lines() if "input" in line.get_label()}
    assert list(lines) == ["input 0 to output 0", "input 6 to output 2", "input 5 to output 5", "input 3 to output 7"]
    taps = view.taps.reshape(D, D, -1).numpy()
    # What D adds to an input's own output would hide all the rest.
    assert np.isnan(lines["input 5 to output 5"][0])
    assert (lines["input 5 to output 5"][1:] == taps[5, 5, 1:]).all()
    assert (lines["input 6 to output 2"] == taps[2, 6]).all()
    assert right.get_legend().get_texts()[0].get_text() == "80 % of pairs"
    with pytest.raises(ValueError, match="pair: want 0 to 63, got 64"):
        analysis.plot_impulse(view, [64])
    gain = analysis.transfer_function(build("s5", d_state=4))
    assert (gain.inputs, analysis.transfer_function(build("s4d")).inputs) == (D, None)
    named = [text.get_text() for text in analysis.plot_transfer(gain, [9]).legends[0].get_texts()]
    assert named == ["80 % of pairs", "input 1 to output 1"]


def test_the_legend_of_states_is_beside_the_curves():
    figure = PICTURES["states"]()
    assert figure.axes[0].get_legend() is None
    assert len(figure.legends[0].get_texts()) == 6


def test_names_that_are_no_picture(tmp_path):
    figure = analysis.plot_spectrum(analysis.spectrum(build("s4d")))
    with pytest.raises(ValueError, match=r"out: want a file name that ends in .png, got m.jpg"):
        analysis.save(figure, "m.jpg")
    with pytest.raises(ValueError, match="channel: want 0 to 7, got 8"):
        analysis.plot_impulse(analysis.impulse_response(build("s4d"), 5), [8])
