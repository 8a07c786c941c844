import json

import pytest
from rich.console import Console

from statewise import load, recipes
from statewise.data.text import TextOptions
from statewise.recipes.models import build_language_model
from statewise.recipes.report import pick_prompts
from statewise.training.directory import RunDirectory, read_metrics
from statewise.training.options import Training

TINY = {"d_model": 32, "n_layer": 1, "model": {"name": "mamba2", "d_state": 8, "head_dim": 16}}


def _model(model, **options):
    sizes = {"d_model": 32, "n_layer": None, "default_width": 64, "default_depth": 4}
    return build_language_model(model, 50, **{**sizes, **options}).config


def test_ways_to_name_a_model():
    assert _model("s4d")["mixer"] == "s4d"
    assert (_model("s4d")["n_layer"], _model("s4d")["d_model"]) == (4, 32)
    assert _model("s4d,attention")["mixer"] == ["s4d", "attention"]
    assert _model(["s4d", "s4d", "attention"])["n_layer"] == 6
    assert _model("s4d,s4d,s4d,s4d,attention")["n_layer"] == 5
    assert _model({"name": "mamba2", "head_dim": 16})["mixer"] == {"name": "mamba2", "head_dim": 16}
    assert _model("mamba2", small={"mamba2": {"head_dim": 16}})["mixer"] == {"name": "mamba2", "head_dim": 16}
    preset = _model("mamba-130m", n_layer=1)
    assert (preset["vocab_size"], preset["d_model"], preset["n_layer"]) == (50, 32, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mambo", "unknown model 'mambo'; did you mean 'mamba'"),
        ("s4d,atention", "did you mean 'attention'"),
        ("s5-listops", "unknown model 's5-listops'"),
        ("bidirectional", "causal"),
    ],
)
def test_wrong_models(model, message):
    with pytest.raises((ValueError, TypeError), match=message):
        _model(model)


def test_unknown_recipe():
    with pytest.raises(ValueError, match=r"did you mean 'probes\.mqar'"):
        recipes.get("probe.mqar")


def test_prompts_come_from_the_text():
    text = b"Title\n=====\n\n" + b"".join(b"Sentence %d goes on and on for some time.\n" % i for i in range(40))
    prompts = pick_prompts(text)
    assert len(set(prompts)) == 3
    assert all(p.startswith("Sentence") and p.encode() in text for p in prompts)
    assert all(pick_prompts(bytes(range(256)) * n) for n in (1, 2, 20))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    training = Training(steps=6, batch_size=2, eval_every=4, checkpoint_every=2, warmup=2)
    made = recipes.get("language.bytes")(
        **TINY, length=32, data=TextOptions(path=str(folder / "a.txt"), packed=True), training=training
    )
    run = RunDirectory.new(made.name, str(folder / "run"))
    console = Console(record=True, width=100, file=open(folder / "log", "w"))  # noqa: SIM115
    outcome = recipes.execute(made, run, console=console)
    return made, run, outcome, console.export_text()


def test_a_run_leaves_all_its_files(finished):
    made, run, outcome, text = finished
    assert outcome.finished
    names = {p.name for p in run.path.iterdir()}
    assert names == {
        *("config.yaml", "config.json", "metrics.csv", "checkpoints", "model.safetensors"),
        *("results.json", "machine.json", "curve.png", "README.md", "report.html"),
    }
    results = json.loads(run.results.read_text())
    assert f"{results['bits_per_byte']:.3f}" in run.card.read_text()
    assert set(results["baselines"]) == {"uniform", "unigram", "order-2 model", "gzip -9", "bzip2 -9", "xz -9e"}
    assert all(name in text for name in results["baselines"])
    assert "mamba2, 1 layer of width 32" in run.card.read_text()
    assert "loss: between " in run.page.read_text()
    assert run.curve.read_bytes().startswith(b"\x89PNG")
    assert run.read_config() == {"recipe": "language.bytes", **made.config()}


def test_metrics_of_a_run(finished):
    _, run, _, _ = finished
    rows = read_metrics(run.metrics)
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows if "val_loss" in r] == [4, 6]  # the last step is validated too
    assert [r["tokens"] for r in rows if "loss" in r] == [64 * s for s in range(1, 7)]
    assert [r["lr"] for r in rows if "loss" in r][:2] == pytest.approx([1e-3, 2e-3])


def test_the_saved_model_is_the_trained_one(finished):
    made, run, _, _ = finished
    saved = load(run.path).state_dict()
    assert all(bool((saved[n] == p).all()) for n, p in made.model.state_dict().items())


def test_checkpoints_kept(finished):
    _, run, _, _ = finished
    # Every 2 steps; the last two stay, and the best of those that were validated is one of them here.
    assert run.saved_steps() == [4, 6]


@pytest.mark.parametrize("name", ["probes.selective_copying", "probes.mqar"])
@pytest.mark.parametrize("mixer", ["mamba", "s4d", "s5", "mamba2", "attention"])
def test_probes_run_with_any_mixer(name, mixer, tmp_path):
    training = Training(steps=1, batch_size=4)
    made = recipes.get(name)(model=mixer, d_model=32, n_layer=1, length=16, training=training, **_small(name))
    run = RunDirectory.new(name, str(tmp_path / "run"))
    recipes.execute(made, run)
    results = json.loads(run.results.read_text())
    assert 0 <= results["accuracy"] <= 1
    assert results["chance"] == (1 / 16 if "copying" in name else round(1 / 16, 4))


def _small(name):
    return {"n_copy": 4} if "copying" in name else {"n_pairs": 4, "vocab_size": 32}
