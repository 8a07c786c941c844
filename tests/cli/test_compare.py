import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import statewise
from statewise.cli import compare, main
from statewise.recipes.compare import Comparison
from statewise.training.directory import read_metrics

# What this process imports, other processes import too, with the kernels that it has compiled.
SRC = Path(statewise.__file__).parents[1]
TINY = ["--d-model", "16", "--n-layer", "1", "--length", "12", "--n-pairs", "2", "--vocab-size", "16", "--warmup", "2"]
RUN = ["--batch-size", "4", "--eval-every", "50", "--checkpoint-every", "10", "--accelerator", "cpu"]


def _arguments(*more, models="s4d,attention"):
    return ["compare", "probes.mqar", "--models", models, *TINY, *RUN, *more]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _error(capsys, *arguments):
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "RECIPE is missing"),
        (("probes.mqr", "--models", "s4d"), "did you mean 'probes.mqar'"),
        (("probes.mqar",), "--models: want models with commas"),
        (("probes.mqar", "--model", "s4d"), "--model: a comparison has --models"),
        (("probes.mqar", "--models", "s4d", "--seed", "1"), "--seed: a comparison has --seeds"),
        (("probes.mqar", "--models", "s4d,s4d"), "s4d is there twice"),
        (("probes.mqar", "--models", "s4d", "--seeds", "none"), "--seeds: want a number of seeds"),
        (("probes.mqar", "--models", "s4d", "--lrs", "0"), "--lrs: want different positive numbers"),
        (("probes.mqar", "--models", "s4d", "--jobs", "0"), "--jobs: want at least 1"),
        (("probes.mqar", "--models", "s4d", "--jobs", "x"), "--jobs: want INT, got 'x'"),
        (("probes.mqar", "--models", "s4d", "--minutes", "0"), "--minutes: want more than 0"),
        (("probes.mqar", "--models", "s4d", "--match", "flops"), "--match: want parameters"),
        (("probes.mqar", "--models", "s4d", "--lrs", "1", "--seeds", "1000,"), "--tuning-seed"),
        (("--report", "nowhere"), "nowhere is not a comparison"),
        (("--report", "a", "--jobs", "2"), "--report: takes no other option"),
        (("--out", "nowhere"), "nowhere is not a comparison"),
    ],
)
def test_mistakes(here, capsys, arguments, message):
    assert message in _error(capsys, "compare", *arguments)
    assert not any(p for p in here.rglob("compare.yaml"))


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("s4d,mambo", "model mambo: unknown model 'mambo'; did you mean 'mamba'"),
        ("s4d,odd={name: mamba2, head_dim: 5}", "model odd:"),
        ("s4d,wrong={name: s4d, d_stat: 5}", "model wrong:"),
    ],
)
def test_what_cannot_be_built_is_known_before_anything_is_trained(here, capsys, models, message):
    assert message in _error(capsys, *_arguments("--out", "c", models=models))
    assert not (here / "c").exists()


def test_a_directory_of_something_else_is_not_taken(here, capsys):
    (here / "c").mkdir()
    (here / "c" / "notes.txt").write_text("mine")
    assert "c exists and is not a comparison" in _error(capsys, *_arguments("--out", "c"))


@pytest.mark.parametrize("left", [[".lock"], [".lock", "models.json"], [".lock", ".compare.yaml.1.2.tmp"]])
def test_what_was_killed_before_its_plan_is_begun_again(here, capsys, left, monkeypatch):
    (here / "c").mkdir()
    for name in left:
        (here / "c" / name).write_text("half")
    begun = []
    monkeypatch.setattr(Comparison, "carry_out", lambda self, pool: begun.append(list(self.facts.models)) or {})
    monkeypatch.setattr(compare, "_report", lambda comparison: None)
    assert main(_arguments("--out", "c")) == 0, capsys.readouterr().err
    assert begun == [["s4d", "attention"]]


def test_a_typed_warmup_stays_where_models_are_added(here):
    plan, _ = compare._planned("lra.listops", ["--models", "s4", "--profile", "full", "--warmup", "3"])
    plan.write(here / "compare.yaml")
    # The table gives a transformer other steps.
    _, more, _ = compare._continued(["--out", str(here), "--models", "transformer"])
    assert {label: own["warmup"] for label, own in more.options.items()} == {"s4": 3, "transformer": 3}


def test_help_has_the_options_of_both(capsys):
    assert main(["compare", "probes.mqar", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--models", "--seeds", "--lrs", "--match", "--n-pairs", "--steps"))


def _start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "statewise.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        start_new_session=True,
    )


def _wait_for_step(run, step, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        rows = read_metrics(run / "metrics.csv")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"step {step} was not reached in {seconds} s")


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_and_reports(here, capsys):
    process = _start(*_arguments("--seeds", "2", "--steps", "200", "--out", "c", "--match", "parameters"))
    first = here / "c" / "runs" / "s4d-seed0"
    _wait_for_step(first, 30, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # The run notices that its parent is gone, saves and ends; then the directory is free.
    end = time.monotonic() + 60
    while "saved at step" not in (first / "log.txt").read_text() and time.monotonic() < end:
        time.sleep(0.05)
    saved = int(re.search(r"saved at step (\d+)", (first / "log.txt").read_text())[1])
    assert 30 <= saved < 200
    code, refused = main(["compare", "--out", "c", "--jobs", "2"]), ""
    while code and time.monotonic() < end:
        # What the dying processes hold, they hold until they are gone.
        refused = capsys.readouterr().err
        assert "is at work there" in refused
        time.sleep(0.5)
        code = main(["compare", "--out", "c", "--jobs", "2"])
    assert code == 0, refused
    rows = [r for r in read_metrics(first / "metrics.csv") if "lr" in r]
    assert [r["step"] for r in rows] == list(range(1, 201))  # no step was lost, none was made twice
    content = json.loads((here / "c" / "compare.json").read_text())
    assert {(r["model"], r["seed"], r["status"]) for r in content["runs"]} == {
        (model, seed, "finished") for model in ("s4d", "attention") for seed in (0, 1)
    }
    sizes = [m["parameters"] for m in content["models"]]
    assert max(sizes) < 1.2 * min(sizes)
    assert all(m["step_seconds"] > 0 and m["memory_bytes"] > 0 and m["flops"] > 0 for m in content["models"])
    before = (here / "c" / "compare.json").read_bytes()
    capsys.readouterr()
    assert main(["compare", "--report", "c"]) == 0
    assert (here / "c" / "compare.json").read_bytes() == before
    assert "attention" in capsys.readouterr().out
    assert "<html" in (first / "report.html").read_text()
    assert "steps is 200 there, 100 was asked for" in _error(
        capsys, *_arguments("--seeds", "2", "--steps", "100", "--out", "c", "--match", "parameters")
    )


@pytest.mark.slow
def test_runs_that_diverge_are_counted(here):
    assert main(_arguments("--seeds", "1", "--steps", "8", "--lr", "1e30", "--clip", "0", "--out", "c")) == 0
    content = json.loads((here / "c" / "compare.json").read_text())
    assert [r["status"] for r in content["runs"]] == ["diverged"] * 2
    assert all("not finite" in r["message"] for r in content["runs"])
