import os

import pytest

from statewise.training.directory import Metrics, RunDirectory, read_config, read_metrics
from statewise.training.options import Training


def test_numbers_go_up_and_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(RunDirectory.new("x.y")) for _ in range(3)] == [os.path.join("runs", f"x.y-{n}") for n in (1, 2, 3)]


def test_an_existing_directory_is_refused_with_a_proposal(tmp_path):
    taken = tmp_path / "mine"
    taken.mkdir()
    (tmp_path / "mine-2").mkdir()
    with pytest.raises(ValueError, match=r"never overwritten.*mine-3$"):
        RunDirectory.new("x", str(taken))
    (taken / "checkpoints").mkdir()
    (taken / "checkpoints" / "step-000010.safetensors").touch()
    with pytest.raises(ValueError, match=r"--resume .*mine$"):
        RunDirectory.new("x", str(taken))
    (taken / "README.md").touch()
    with pytest.raises(ValueError, match=r"mine-3; that run is finished, see .*README.md$"):
        RunDirectory.new("x", str(taken))


def test_open_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no run directory"):
        RunDirectory.open(str(tmp_path / "no"))
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        RunDirectory.open(str(tmp_path))


def test_config_round_trip(tmp_path):
    run = RunDirectory(tmp_path)
    options = {"model": ["a", {"name": "b"}], "lr": 0.1, "data": {"path": None}}
    run.write_config("r", options, "made here")
    assert run.read_config() == {"recipe": "r", **options}
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ValueError, match="want a mapping"):
        read_config(tmp_path / "list.yaml")
    (tmp_path / "evil.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_config(tmp_path / "evil.yaml")


def test_metrics_drop_what_comes_after_the_step_and_a_torn_row(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv", ["step", "loss", "val_loss"])
    metrics.open(0)
    for step in range(1, 6):
        metrics.add({"step": step, "loss": step / 3})
    metrics.add({"step": 5, "val_loss": 1.0})
    with open(metrics.path, "a") as f:
        f.write("6,1.2")  # killed in the middle of a row: it looks whole but is not
    metrics.open(5)
    rows = read_metrics(metrics.path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 5]
    assert rows[-1] == {"step": 5, "val_loss": 1.0}
    metrics.open(2)
    metrics.add({"step": 3, "loss": 9.0})
    assert [(r["step"], round(r["loss"], 4)) for r in read_metrics(metrics.path)] == [
        (1, 0.3333),
        (2, 0.6667),
        (3, 9.0),
    ]


def test_saved_steps_and_leftovers(tmp_path):
    run = RunDirectory(tmp_path)
    run.checkpoints.mkdir()
    for name in ("step-000020.safetensors", "step-000003.safetensors", ".step-000030.safetensors.12.tmp", "other"):
        (run.checkpoints / name).touch()
    assert run.saved_steps() == [3, 20]
    run.clean()
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [
        "other",
        "step-000003.safetensors",
        "step-000020.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("clip", -1.0),
        ("ema", 1.0),
        ("max_minutes", 0.0),
    ],
)
def test_training_options_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        Training(**{name: value})
