"""The pictures of HiPPO are made, and show what they say."""

from __future__ import annotations

import io

import torch

from statewise.analysis import hippo as plots
from statewise.maths import bases, hippo, transfer
from statewise.testing import assert_agree


def png(figure) -> bytes:
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        return file.getvalue()


def test_kernels():
    figure = plots.plot_kernels(*hippo.legs(6), bases.legs(6), shown=3)
    (axes,) = figure.axes
    lines = axes.get_lines()
    assert len(lines) == 6
    for k in range(3):  # LegS is exact: the dashed line lies on the other
        kernel, meant = (torch.as_tensor(line.get_ydata()) for line in lines[2 * k : 2 * k + 2])
        assert_agree(kernel, meant, f"kernel {k}", len(kernel))
    assert png(figure).startswith(b"\x89PNG")


def test_comparison_and_agreement():
    figure = plots.plot_comparison(transfer.compare(4, points=200))
    assert [len(axes.get_lines()) for axes in figure.axes] == [3, 2]
    assert png(figure).startswith(b"\x89PNG")
    figure = plots.plot_robustness(transfer.compare(4, points=200), transfer.disturb(4))
    assert [len(axes.get_lines()) for axes in figure.axes] == [3, 2, 4, 4]
    assert png(figure).startswith(b"\x89PNG")
    over_n = [transfer.agreement(n) for n in (4, 8)]
    figure = plots.plot_agreement(over_n, [transfer.agreement(4, gamma) for gamma in (100.0, 1000.0)])
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 4]
    left = figure.axes[0]
    assert [label.get_text() for label in left.get_xticklabels()] == ["4", "8"]
    assert not len(left.get_xticks(minor=True))
    assert len(left.get_yticks(minor=True))
    assert png(figure).startswith(b"\x89PNG")
