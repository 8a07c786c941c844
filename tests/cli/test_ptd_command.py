"""`statewise ptd`."""

from __future__ import annotations

import pytest

from statewise import cli
from statewise.maths import ptd, transfer


def test_it_reports_what_was_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STATEWISE_PTD", str(tmp_path / "kept"))
    ptd._perturbed.cache_clear()
    picture = tmp_path / "transfer.png"
    assert cli.main(["ptd", "--n", "8", "--gamma", "100", "--seed", "1", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    found = ptd.perturb(8, 100.0, 1)
    assert f"{found.condition:.1f}" in out
    assert f"{found.relative:.2e}" in out
    assert f"{float(found.Lambda.real.max()):.3f}" in out
    run = transfer.disturb(8, 100.0, 1)
    assert f"{run.error('perturbed', True):.1%}, S4D-LegS {run.error('normal', True):.1%}" in out
    assert "kept in" in out
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "7"], "even state size, got 7"),
        (["--gamma", "0"], "--gamma: want a number from 1 to 1e6"),
        (["--plot", "x.jpg"], "--plot: want a file name that ends in .png, got 'x.jpg'"),
        (["--plot", "nodir/p.png"], "--plot: there is no directory nodir"),
        (["--sed", "1"], "did you mean 'seed'"),
    ],
)
def test_mistakes(words, message, capsys):
    assert cli.main(["ptd", *words]) == 2
    assert message in capsys.readouterr().err
