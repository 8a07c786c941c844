"""`statewise evaluate` of classifiers, at the sampling rate of training and below."""

from __future__ import annotations

import json

import numpy as np
import pytest

import statewise.data.sets
from statewise import load, recipes
from statewise.cli import main
from statewise.cli.evaluate import _write
from statewise.data.classify import ClassifyData
from statewise.data.labelled import Labelled, Split, decimated
from statewise.recipes.label_scores import score
from statewise.testing import toys
from statewise.training.directory import RunDirectory
from statewise.training.options import Training


def waves(lengths=(96, 24, 60)) -> Labelled:
    """Two tones and silence of noise: which is told by its frequency, so by how long a step is."""
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        labels, t = rng.integers(0, 2, n), np.arange(64)
        tones = np.sin((0.15 + 0.15 * labels[:, None]) * t + rng.uniform(0, 6, (n, 1)))
        return Split((1000 * tones + 100 * rng.standard_normal(tones.shape)).astype(np.int16)[..., None], labels)

    return Labelled("waves", *map(split, lengths), length=64, n_classes=2, std=700.0, classes=("low", "[high]"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on toys that stand for a data set, and what runs leave: of tokens, and of a mixer without a rate."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statewise.data.sets, "prepare", prepare)
        training = Training(steps=60, batch_size=24, eval_every=20, checkpoint_every=20, warmup=5, lr=1e-2)
        options = {"d_model": 16, "n_layer": 1, "training": training}
        for name, recipe, model in (("waves", "speech.commands", "s4d"), ("lstm", "speech.commands", "lstm"),
                                    ("tokens", "lra.listops", "s4d")):  # fmt: skip
            run = RunDirectory(root / name)
            run.path.mkdir()
            made = recipes.get(recipe)(model=model, limit_train=70 if name == "waves" else None, **options)
            if name == "waves":
                assert recipes.execute(made, run).finished
            else:
                run.write_config(recipe, made.config(), "A run")
                made.model.save_pretrained(run.path)
        phase = RunDirectory(root / "tokens" / "pretrain")
        phase.path.mkdir()
        phase.write_config("lra.listops, masked pre-training", {}, "A phase of a run")
        made.model.save_pretrained(phase.path)
    return root


def prepare(name, *_, **__):
    return toys.tokens() if name == "listops" else waves()


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.setattr(statewise.data.sets, "prepare", prepare)
    monkeypatch.chdir(runs)
    return runs


def test_the_figures_of_the_run(here, capsys, tmp_path):
    assert main(["evaluate", "waves", "--out", str(tmp_path / "f.json")]) == 0
    told = json.loads((tmp_path / "f.json").read_text())
    results = json.loads((here / "waves" / "results.json").read_text())
    assert told["accuracy"] == pytest.approx(results["accuracy"], abs=1e-5)  # which the run rounds
    assert told["loss"] == pytest.approx(results["loss"], abs=1e-5)
    assert told["confusion"] == np.loadtxt(here / "waves" / "confusion.csv", delimiter=",").tolist()
    assert (told["recipe"], told["split"], told["rate"], told["rows"]) == ("speech.commands", "test", 1.0, 60)
    counts = np.array(told["confusion"])
    for k, one in enumerate(told["classes"]):
        assert one["rows"] == counts[k].sum()
        assert one["recall"] == counts[k, k] / counts[k].sum()
        assert one["precision"] == counts[k, k] / counts[:, k].sum()
    out = capsys.readouterr().out
    assert "[high]" in out
    assert f"accuracy {told['accuracy']:.2%}, loss {told['loss']:.4f} nats" in out


@pytest.mark.parametrize(("split", "rows"), [("validation", 24), ("train", 70)])
def test_other_splits(here, split, rows, tmp_path):
    assert main(["evaluate", "waves", "--split", split, "--out", str(tmp_path / "f.json")]) == 0
    told = json.loads((tmp_path / "f.json").read_text())
    assert told["rows"] == rows  # of the training rows those that were trained on
    data = ClassifyData(waves(), 7, limit=70)
    found = score(load(here / "waves").train(), data.split(split), 2)  # whatever mode it was left in
    assert told["confusion"] == found.counts.tolist()
    assert told["loss"] == pytest.approx(found.loss, rel=1e-5)


def test_tokens_and_a_checkpoint(here, capsys):
    assert main(["evaluate", "tokens", "--split", "validation"]) == 0
    assert "11 rows of validation" in capsys.readouterr().out
    assert main(["evaluate", "waves/checkpoints/step-000060.safetensors"]) == 0
    assert "60 rows of test" in capsys.readouterr().out


def test_half_the_rate_without_training_again(here, tmp_path):
    accuracy = {}
    for rate in ("1", "0.5", "0.33"):
        assert main(["evaluate", "waves", "--rate", rate, "--out", str(tmp_path / "f.json")]) == 0
        accuracy[rate] = json.loads((tmp_path / "f.json").read_text())["accuracy"]
    assert accuracy["1"] > 0.9
    assert accuracy["0.5"] > accuracy["1"] - 0.1
    assert json.loads((tmp_path / "f.json").read_text())["rate"] == 1 / 3
    # With steps of the old length a tone sounds twice as high.
    data = ClassifyData(decimated(waves(), 2), 8)
    assert score(load("waves"), data.split("test"), 2).accuracy < accuracy["0.5"] - 0.2
    assert score(load("waves").at_sampling_rate(0.5), data.split("test"), 2).accuracy == accuracy["0.5"]


def test_a_loss_that_is_no_number_is_null(tmp_path):
    _write(tmp_path / "f.json", {"loss": float("nan"), "classes": [{"recall": float("inf")}], "rows": 3})
    assert json.loads((tmp_path / "f.json").read_text()) == {"loss": None, "classes": [{"recall": None}], "rows": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_mistakes(here, capsys, tmp_path):
    (here / "empty").mkdir(exist_ok=True)
    for words, message in (
        (
            ["waves", "--rate", "0.7"],
            "rate: want 1 / k for a whole number k, such as 0.5 for every second value, got 0.7",
        ),
        (["waves", "--rate", "0"], "rate: want 1 / k"),
        (["waves", "--rate", "2"], "rate: want 1 / k"),
        (["waves", "--rate", "0.01"], "rate: want every 1st to 64th value"),
        (["tokens", "--rate", "0.5"], "rate: toy tokens has tokens"),
        (["lstm", "--rate", "0.5"], "rate: LSTM offers none"),
        (["waves", "--split", "dev"], "--split: want test|validation|train, got 'dev'"),
        (["waves", "--data.path", "x.txt"], "data.path: waves is a classifier; it takes --split and --rate"),
        (["waves", "--chunk", "7"], "chunk: waves is a classifier"),
        (["waves", "--out", "no/where.json"], "--out: there is no directory no"),
        (["nowhere", "--out", "no/where.json"], "--out: there is no directory no"),  # before anything else
        (["waves", "--rate", "1e-320"], "rate: want 1 / k"),
        (["empty"], "holds no model.safetensors"),
        (["tokens/pretrain"], "is no recipe of `statewise list`"),
    ):
        assert main(["evaluate", *words]) == 2, words
        assert message in capsys.readouterr().err
