import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from statewise import load, recipes
from statewise.cli.errors import UserError
from statewise.cli.run import _options
from statewise.data.classify import ClassifyData
from statewise.inference import load_run
from statewise.models.classification import SequenceClassifier
from statewise.recipes import _long_range as tables
from statewise.recipes.best import keep_best
from statewise.recipes.classification import _causal
from statewise.tasks import Classification
from statewise.testing import toys
from statewise.training.directory import RunDirectory, read_metrics
from statewise.training.fit import fit
from statewise.training.options import Training, shares

RECIPES = {"lra.listops": "tokens", "lra.retrieval": "pairs", "image.fashion_mnist": "pixels"}
SHORT = Training(steps=6, batch_size=4, eval_every=2, checkpoint_every=2, warmup=1, lr=1e-2)


@pytest.fixture(autouse=True)
def sets(monkeypatch):
    """Recipes get toys instead of their data."""
    import statewise.data.sets

    kinds = {"listops": "tokens", "retrieval": "pairs"}
    monkeypatch.setattr(statewise.data.sets, "prepare", lambda name, *_, **__: toys.SETS[kinds.get(name, "pixels")]())


def _run(name, path, *, resume=False, training=SHORT, **options):
    made = recipes.get(name)(**{"model": "s4d", "d_model": 8, "n_layer": 1, "training": training, **options})
    run = RunDirectory(path)
    run.path.mkdir(exist_ok=True)
    console = Console(record=True, width=120, quiet=False, file=open(path.parent / "log", "w"))  # noqa: SIM115
    outcome = recipes.execute(made, run, resume=resume, console=console)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(run.metrics)]
    return made, run, outcome, rows, console.export_text()


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_leaves_all_its_files(name, tmp_path):
    made, run, outcome, rows, text = _run(name, tmp_path / "run")
    assert outcome.finished
    assert {p.name for p in run.path.iterdir()} >= {
        *("config.yaml", "config.json", "metrics.csv", "checkpoints", "model.safetensors"),
        *("results.json", "curve.png", "confusion.png", "confusion.csv", "README.md"),
    }
    results = json.loads(run.results.read_text())
    assert f"{results['accuracy']:.2%}" in run.card.read_text()
    assert results["baselines"].keys() >= {"majority"}
    assert all(rule in text for rule in results["baselines"])
    counts = np.loadtxt(run.path / "confusion.csv", delimiter=",")
    assert counts.sum() == results["test_rows"] == 10
    assert counts.trace() / 10 == pytest.approx(results["accuracy"])
    validated = {r["step"]: r["val_accuracy"] for r in rows if "val_accuracy" in r}
    best = max(run.saved_steps(), key=lambda s: (validated[s], -s))
    assert (results["best_step"], results["val_accuracy"]) == (best, pytest.approx(validated[best], abs=1e-5))
    # The saved model is that of the best step, and the figures are its own.
    model = load(run.path)
    right = sum(int((model(b.tokens, b.seg).argmax(-1) == b.targets).sum()) for b in made.data.split("test"))
    assert right / 10 == pytest.approx(results["accuracy"])
    assert run.read_config() == {"recipe": name, **made.config()}


# The others are tried once more where there is time.
QUICK = ("lstm", "mamba2,attention")
FAMILIES = [*tables.FAMILIES, "rglru", "mamba2,attention"]


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_any_model_runs(family, tmp_path):
    _, run, outcome, _, _ = _run("lra.listops", tmp_path / "run", model=family, n_layer=2, d_model=16)
    assert outcome.finished
    assert json.loads(run.results.read_text())["parameters"] > 0


PHASES = (("lra.listops", "masked"), ("lra.retrieval", "masked"), ("image.fashion_mnist", "causal"))


@pytest.mark.parametrize(("name", "pretrain"), PHASES)
def test_a_phase_before_the_labels(name, pretrain, tmp_path):
    options = {"pretrain": pretrain, "pretrain_steps": 4}
    made, run, _, rows, _ = _run(name, tmp_path / "run", **options)
    inner = RunDirectory(run.path / "pretrain")
    told = json.loads(run.results.read_text())["pretraining"]
    assert told == json.loads(inner.results.read_text())
    assert told["steps"] == 4
    assert inner.curve.is_file()
    assert "(pretrain/curve.png)" in run.card.read_text()
    # The weights were handed over: a run that starts from others has another first loss.
    _, _, _, scratch, _ = _run(name, tmp_path / "scratch")
    assert rows[0]["loss"] != scratch[0]["loss"]
    first = made.before.recipe.training
    assert first.lr == tables.pretrain_lr("listops", "s4d", "small")
    assert first.lr * first.dynamics_lr == pytest.approx(SHORT.lr * SHORT.dynamics_lr)


def test_one_pretraining_serves_several_runs(tmp_path):
    options = {"pretrain": "masked", "pretrain_steps": 4}
    _, first, _, rows, _ = _run("image.digits", tmp_path / "first", **options)
    taken = {"pretrain": "masked", "pretrain_from": str(first.path)}
    _, second, outcome, again, text = _run("image.digits", tmp_path / "second", **taken)
    assert outcome.finished
    assert again == rows
    assert "taken from" in text
    inner = second.path / "pretrain"
    assert (inner / "results.json").read_text() == (first.path / "pretrain" / "results.json").read_text()
    assert (inner / "curve.png").is_file()
    assert not (inner / "checkpoints").exists()
    for change, message in (
        ({"d_model": 12}, "has another model: its d_model differ"),
        ({"pretrain": "causal"}, "holds 'image.digits, masked pre-training', want 'image.digits, causal"),
        ({"pretrain": "none"}, "--pretrain-from: got .* without --pretrain"),
        ({"pretrain_steps": 3}, "want no --pretrain-steps"),
        ({"pretrain_from": str(tmp_path)}, "holds no pre-training that has ended"),
    ):
        with pytest.raises(ValueError, match=message):
            _run("image.digits", tmp_path / "third", **{**taken, **change})


def test_a_signal_at_the_end_of_the_first_phase_stops_the_run(tmp_path, monkeypatch):
    from statewise.recipes import _execute

    options = {"pretrain": "masked", "pretrain_steps": 4}
    with monkeypatch.context() as patch:
        real = _execute._before
        patch.setattr(_execute, "_before", lambda *given: replace(real(*given), signal=2))
        _, _, outcome, rows, _ = _run("image.digits", tmp_path / "run", **options)
    assert (outcome.finished, outcome.signal, rows) == (False, 2, [])
    _, _, outcome, rows, _ = _run("image.digits", tmp_path / "run", resume=True, **options)
    assert outcome.finished
    assert rows


def test_time_is_that_of_all_phases(tmp_path):
    options = {"pretrain": "masked", "pretrain_steps": 4, "training": replace(SHORT, max_minutes=1e-6)}
    _, run, outcome, rows, _ = _run("image.digits", tmp_path / "run", **options)
    assert not outcome.finished
    inner = RunDirectory(run.path / "pretrain")
    while not inner.results.is_file():
        _, run, outcome, rows, _ = _run("image.digits", tmp_path / "run", resume=True, **options)
        assert not outcome.finished
    assert rows == []


def test_both_phases_can_be_resumed(tmp_path):
    options = {"pretrain": "masked", "pretrain_steps": 6}
    _, run, _, rows, _ = _run("image.fashion_mnist", tmp_path / "run", **options)
    first = RunDirectory(run.path / "pretrain")
    before, weights = read_metrics(first.metrics), load(run.path).state_dict()
    kept = before

    def forget(directory, step):
        for path in (directory.model, directory.results, directory.card):
            path.unlink(missing_ok=True)
        for saved in directory.saved_steps():
            if saved > step:
                directory.checkpoint(saved).unlink()

    # As if killed in the second phase, then in the first.
    for cut in ("second", "first"):
        forget(run, 4 if cut == "second" else 0)
        if cut == "first":
            forget(first, first.saved_steps()[-2])
            kept = [row for row in before if row["step"] <= first.saved_steps()[-1]]
        _, _, outcome, again, _ = _run("image.fashion_mnist", tmp_path / "run", resume=True, **options)
        assert outcome.finished, cut
        assert again == rows, cut
        assert all(torch.equal(t, load(run.path).state_dict()[n]) for n, t in weights.items()), cut
        assert [r["loss"] for r in read_metrics(first.metrics) if "loss" in r] == [
            r["loss"] for r in before if "loss" in r
        ], cut
        # What was done already was not done again: its rows still have their times.
        assert read_metrics(first.metrics)[: len(kept)] == kept, cut


def test_a_resumed_run_is_the_same_run(tmp_path):
    _, run, _, rows, _ = _run("lra.listops", tmp_path / "run")
    for path in (run.checkpoint(6), run.card, run.results, run.model):
        path.unlink()
    _, _, outcome, again, _ = _run("lra.listops", tmp_path / "run", resume=True)
    assert outcome.finished
    assert again == rows


def test_the_kept_step_is_one_that_was_saved(tmp_path):
    made, run, _, rows, _ = _run("lra.listops", tmp_path / "run", training=replace(SHORT, eval_every=1))
    assert run.saved_steps()[-2:] == [4, 6]  # and the best, if that is another
    value = max(row["val_accuracy"] for row in rows if "val_accuracy" in row and row["step"] in (2, 4, 6))
    with open(run.metrics, "a") as file:
        names = run.metrics.read_text().split("\n")[0].split(",")
        file.write(",".join({"step": "3", "seconds": "9", "val_accuracy": "1.5"}.get(n, "") for n in names) + "\n")
    step, kept = keep_best(made, run)
    assert kept == value
    saved, own = load_run(run.checkpoint(step)).state_dict(), made.model.state_dict()
    assert saved.keys() == own.keys()
    assert all(torch.equal(t, own[n]) for n, t in saved.items())


def test_a_lower_loss_is_better(tmp_path):
    _, run, _, _, _ = _run("image.fashion_mnist", tmp_path / "run", pretrain="masked", pretrain_steps=4)
    inner = RunDirectory(run.path / "pretrain")
    told = json.loads(inner.results.read_text())
    assert told["val_loss"] == pytest.approx(min(r["val_loss"] for r in read_metrics(inner.metrics) if "val_loss" in r))


def test_the_seed_is_that_of_weights_and_order():
    def made(seed):
        recipe = recipes.get("lra.listops")(d_model=8, n_layer=1, training=replace(SHORT, seed=seed))
        return recipe.model.head.weight, recipe.data.batch(0).tokens

    assert all(torch.equal(a, b) for a, b in zip(made(3), made(3)))
    weights, tokens = zip(made(3), made(4))
    assert not torch.equal(*weights)
    assert not torch.equal(*tokens)


def test_sixteen_rows_are_learned_by_heart(tmp_path):
    torch.manual_seed(0)
    model = SequenceClassifier(2, 32, 2, vocab_size=toys.VOCAB, mixer={"name": "s4d", "d_state": 8}, norm="batch")
    data = ClassifyData(toys.tokens(), 16, limit=16)
    run = RunDirectory(tmp_path)
    fit(Classification(model, 2), data, Training(steps=60, batch_size=16, lr=1e-2, weight_decay=0.0), run)
    assert read_metrics(run.metrics)[-2]["accuracy"] == 1.0


def test_the_table_fills_in_what_is_not_said():
    s5 = _options("lra.listops").parse(["--model", "s5", "--profile", "full"])["training"]
    assert (s5.batch_size, s5.steps, s5.lr) == (50, 76_800, pytest.approx(3e-3))
    assert s5.groups == {"B": {"lr": 1.0, "weight_decay": 0.04}}
    s4d = _options("lra.listops").parse(["--profile", "full", "--steps", "9"])["training"]
    assert (s4d.batch_size, s4d.steps, s4d.lr) == (32, 9, 0.01)
    assert s4d.lr * s4d.dynamics_lr == pytest.approx(1e-3)
    again = _options("lra.listops").parse([], recipes.get("lra.listops")(model="s5", d_model=8, n_layer=1).config())
    assert again["training"] == tables.training("listops", "s5", "small")
    after = _options("lra.text").parse(["--model", "s4", "--profile", "full", "--pretrain", "masked"])["training"]
    assert (after.lr, after.final_lr, after.dynamics_lr) == (5e-4, 1.0, 1.0)
    told = {"groups": {"B": {"lr": 0.5, "weight_decay": 0.0}}}
    assert _options("lra.listops").parse([], {"model": "s5", **told})["training"].groups == told["groups"]
    # A file says what the table would, then the command line has the last word.
    values = _options("lra.listops").parse(["--lr", "0.5"], {"profile": "full", "lr": 0.25, "warmup": 3})
    assert (values["training"].lr, values["training"].warmup, values["training"].steps) == (0.5, 3, 120_000)
    # The same function from Python.
    made = recipes.get("lra.listops")(model="s5", d_model=8, n_layer=1)
    assert made.training == tables.training("listops", "s5", "small")
    assert made.config()["lr"] == made.training.lr


def test_the_transformer_is_trained_as_published():
    for task, (steps, batch, warmup, lr) in {
        "listops": (300_000, 32, 2_000, 1e-4),
        "text": (50_765, 32, 2_000, 1e-4),
        "image": (180_000, 50, 2_000, 1e-3),
        "pathx": (1_000_000, 32, 5_000, 5e-4),
    }.items():
        got = tables.training(task, "transformer", "full")
        assert (got.steps, got.batch_size, got.warmup, got.lr, got.final_lr) == (steps, batch, warmup, lr, 1.0), task
    assert tables.training("text", "transformer", "full").weight_decay == 0.1
    assert tables.config("text", "transformer", "full")["head"] == "mlp"
    assert tables.config("retrieval", "transformer", "full")["head"] == "pair"


@pytest.mark.parametrize(
    ("words", "file", "want"),
    [
        ("", {}, (8000, 400, 800, 800)),
        ("--steps 200", {}, (200, 10, 20, 20)),
        ("", {"steps": 200}, (200, 10, 20, 20)),
        ("--steps 1234", {}, (1234, 62, 124, 124)),  # ten validations, as before
        ("--steps 3", {}, (3, 0, 1, 1)),
        ("--steps 200 --warmup 7", {}, (200, 7, 20, 20)),
        ("--steps 200 --eval-every 50", {}, (200, 10, 50, 50)),  # no validation without a checkpoint
        ("--steps 200 --checkpoint-every 7", {}, (200, 10, 21, 7)),  # nearly 20, where there is a checkpoint
        ("--checkpoint-every 1000", {}, (8000, 400, 1000, 1000)),
        ("--eval-every 30 --checkpoint-every 20", {}, (8000, 400, 30, 20)),
        ("--steps 200", {"warmup": 3, "eval_every": 5, "checkpoint_every": 7}, (200, 3, 5, 7)),
    ],
)
def test_other_steps_keep_the_shares_of_the_table(words, file, want):
    got = _options("lra.listops").parse(words.split(), file)["training"]
    assert (got.steps, got.warmup, got.eval_every, got.checkpoint_every) == want


@pytest.mark.parametrize("name", ["steps", "eval_every", "checkpoint_every", "warmup"])
def test_no_negative_pace(name):
    with pytest.raises(UserError, match=f"{name}: want"):
        _options("lra.listops").parse([f"--{name.replace('_', '-')}", "-3"])


@pytest.mark.parametrize("name", ["steps", "eval_every", "checkpoint_every"])
@pytest.mark.parametrize("recipe", ["image.digits", "language.bytes"])
def test_no_null_pace_in_a_file(recipe, name):
    with pytest.raises(UserError, match=f"{name}: want INT, got null"):
        _options(recipe).parse([], {name: None})
    assert _options(recipe).parse([], {"max_minutes": None})["training"].max_minutes is None


def test_one_distance_stays_a_multiple_of_the_other():
    for saved, validated in ((50, 100), (100, 50), (70, 100)):
        table = {"steps": 1000, "warmup": 10, "eval_every": validated, "checkpoint_every": saved}
        for steps in (1, 7, 311, 999, 1000, 4321):
            got = shares(table, steps)
            if 70 not in (saved, validated):
                assert got["eval_every"] * saved == got["checkpoint_every"] * validated
            assert -(-steps // got["eval_every"]) <= 1000 // validated
        assert shares(table, 1000) == table


@pytest.mark.parametrize("task", tables.SAMPLES)
@pytest.mark.parametrize("profile", ["small", "full"])
@pytest.mark.parametrize("pretrain", ["none", "causal"])
def test_every_row_of_the_tables_makes_a_model(task, profile, pretrain):
    for family in tables.FAMILIES:
        config = tables.config(task, family, profile)
        mixer = config["mixer"] if pretrain == "none" else _causal(config["mixer"])
        with torch.device("meta"):
            model = SequenceClassifier(**{**config, "mixer": mixer}, n_outputs=2, channels=1)
        for name, told in tables.training(task, family, profile, pretrain).groups.items():
            assert told
            assert any(name in p.split(".") for p, _ in model.named_parameters()), (family, name)


def test_the_transformer_of_path_x_attends_to_blocks():
    full = tables.config("pathx", "transformer", "full")
    assert full["mixer"] == {"name": "bidirectional_attention", "n_heads": 4, "block": 4096}
    assert full["pool"] == "max"
    assert "block" not in tables.config("pathfinder", "transformer", "full")["mixer"]
    assert _causal(full["mixer"]) == {"name": "attention", "n_heads": 4, "window": 8192}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "s6"}, "unknown model 's6'; did you mean"),
        ({"model": {"name": "bidirectional"}, "pretrain": "causal"}, "pretrain: 'causal' needs a causal mixer"),
        ({"limit_train": 100}, "limit_train: want 1 to 37 rows"),
        ({"pretrain": "masked", "pretrain_steps": 0}, "--pretrain-steps: want at least 1, got 0"),
        ({"pretrain": "masked", "pretrain_steps": -3}, "--pretrain-steps: want at least 1, got -3"),
        ({"pretrain": "masked", "pretrain_lr": 0.0}, "--pretrain-lr: want a positive number, got 0.0"),
        ({"pretrain": "causal", "pretrain_lr": -1.0}, "--pretrain-lr: want a positive number, got -1.0"),
        ({"pretrain_steps": 5}, "--pretrain-steps: got 5 without --pretrain; want --pretrain masked"),
        ({"pretrain_lr": 0.1}, "--pretrain-lr: got 0.1 without --pretrain"),
        ({"pretrain": "masked", "training": Training(devices=2)}, "trains on one device, got 2"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        recipes.get("lra.listops")(**options)
