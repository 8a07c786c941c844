import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import statewise
from statewise.cli import main
from statewise.training.directory import RunDirectory, read_metrics

# What this process imports, other processes import too, with the kernels that it has compiled.
SRC = Path(statewise.__file__).parents[1]
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 100
SMALL = [
    "--d-model",
    "32",
    "--n-layer",
    "1",
    "--length",
    "32",
    "--batch-size",
    "4",
    "--warmup",
    "5",
    "--accelerator",
    "cpu",
]
MODEL = '{"name": "mamba2", "d_state": 8, "head_dim": 16}'


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(TEXT)
    return tmp_path


def _arguments(*more):
    return ["run", "language.bytes", "--data.path", "t.txt", "--model", MODEL, *SMALL, *more]


def _start(arguments, **environment):
    # A process group of its own, so that a signal reaches the program and nothing else.
    return subprocess.Popen(
        [sys.executable, "-m", "statewise.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), **environment},
        start_new_session=True,
    )


def _finish(process, seconds=150):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def _wait_for_step(run, step, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"ended early with {process.returncode}: {process.communicate()}")
        rows = read_metrics(run / "metrics.csv")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"step {step} was not reached in {seconds} s")


def _losses(run):
    """Everything in metrics.csv that is not a time."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(run / "metrics.csv")]


def _error(capsys, *arguments):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("statewise: error: ")
    assert err.count("\n") == 1, "one line, no traceback"
    return err


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "unknown command 'rnu'; did you mean 'run'?"),
        (["run", "language.byts"], "unknown recipe 'language.byts'; did you mean 'language.bytes'?"),
        (["run", "--stepz", "3"], "unknown option 'stepz'; did you mean 'steps'?"),
        (["run", "--batch-sise", "3"], "did you mean 'batch-size'"),
        (["run", "--steps", "many"], "--steps: want INT, got 'many'"),
        (["run", "--steps"], "--steps: want a value"),
        (["run", "--steps", "0"], "error: --steps: want at least 1, got 0"),
        (["run", "--precision", "16"], "--precision: want 32|bf16-mixed, got '16'"),
        (["run", "--data.held-out", "1.5"], "--data.held-out: want a share between 0 and 1"),
        (["run", "--model", "mambo"], "unknown model 'mambo'; did you mean 'mamba'"),
        (["run", "--model", '{"name": "mamba2", "d_stat": 4}'], "did you mean 'd_state'"),
        (["run", "--data.path", "missing.txt"], "data.path: there is no file or directory missing.txt"),
        (["run", "--data.path", "empty.txt"], "data.path: empty.txt is empty"),
        (["run", "--data.path", "small.txt"], "data.path: small.txt is too small: 50 bytes"),
        (["run", "--data.path", "t.txt", "--out", "."], "out: . exists already and is never overwritten"),
        (["run", "--batch-size", "3", "--devices", "2"], "--batch-size: 3 rows do not divide over 2 devices"),
        (["run", "--resume", "nowhere"], "there is no run directory nowhere"),
        (["run", "--resume", "."], "not a run directory"),
        (["run", "--resume", "x", "--steps", "3"], "--resume: takes no other option than --max-minutes, got --steps 3"),
        (["run", "--config", "none.yaml"], "cannot read none.yaml"),
        (["run", "--config", "bad.yaml"], "config file: unknown option 'stpes'; did you mean 'steps'?"),
        (["run", "--config", "type.yaml"], "config file: steps: want INT, got 'x'"),
        (["run", "probes.mqar", "--config", "probe.yaml"], "is for the recipe probes.selective_copying"),
        (["run", "probes.mqar", "--n-pairs", "40"], "--n-pairs: want 1 to length / 3"),
        (["run", "language.bytes", "extra"], "unexpected argument 'extra'"),
        (["generate"], "RUN_DIR is missing"),
        (["generate", "nowhere"], "there is no run directory nowhere"),
        (["generate", "."], "holds no model.safetensors"),
        (["evaluate", "nowhere"], "there is no run directory nowhere"),
        (["list", "qqq"], "nothing matches 'qqq'"),
        (["doctor", "--fix"], "takes no options"),
    ],
)
def test_mistakes_get_one_line(here, capsys, arguments, message):
    (here / "empty.txt").touch()
    (here / "small.txt").write_text("x" * 50)
    (here / "bad.yaml").write_text("stpes: 3")
    (here / "type.yaml").write_text("steps: x")
    (here / "probe.yaml").write_text("recipe: probes.selective_copying")
    assert message in _error(capsys, *arguments)
    assert not (here / "runs").exists()


def test_a_run_directory_is_never_overwritten(here, capsys):
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("precious")
    assert "--out mine-2" in _error(capsys, *_arguments("--steps", "1", "--out", "mine"))
    assert [p.name for p in (here / "mine").iterdir()] == ["thesis.txt"]


# ---- what prints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["generate", "--help"]])
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import sys; from statewise.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'numba', 'matplotlib', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "statewise" in done.stdout


def test_as_a_module():
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    command = [sys.executable, "-m", "statewise", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("statewise ")


@pytest.mark.parametrize("recipe", ["language.bytes", "probes.mqar", "probes.selective_copying"])
def test_help_of_a_recipe_has_every_option_on_lines_that_fit(capsys, recipe):
    assert main(["run", recipe, "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("model", "d-model", "n-layer", "steps", "batch-size", "lr", "seed", "out", "precision", "devices"):
        assert re.search(rf"^  --{option} \S", text, re.M), option
    assert max(map(len, text.splitlines())) <= 130
    assert recipe in text


def test_list(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for word in ("mamba2-130m", "129.0 M", "arXiv 2405.21060", "s4d", "attention", "language.bytes", "probes.mqar"):
        assert word in text
    assert main(["list", "probes*"]) == 0
    text = capsys.readouterr().out
    assert "probes.mqar" in text
    assert "mamba-130m" not in text


def test_doctor_finds_a_wrong_kernel(capsys, monkeypatch):
    from statewise.cli import doctor
    from statewise.ops import OPS

    assert "selective_scan" in OPS
    monkeypatch.setattr(doctor, "measure", lambda: [("nothing", "measured")])
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in OPS)
    assert "WRONG" not in text
    # The first call compiles, so it says little about speed.
    head = next(line for line in text.split("\n") if "back-end" in line)
    assert head.split() == ["op", "back-end", "check", "first", "call", "second", "why"]

    import dataclasses

    spec = OPS["selective_scan"]

    def off(**inputs):
        y, state = spec.run(**inputs)
        return y * 1.001, state

    monkeypatch.setitem(OPS, "selective_scan", dataclasses.replace(spec, run=off))
    assert main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


# ---- a run from beginning to end ---------------------------------------------------------------------------------


def test_run_generate_evaluate(here, capsys):
    assert main(_arguments("--steps", "4")) == 0
    run = os.path.join("runs", "language.bytes-1")
    out = capsys.readouterr().out
    assert "bits per byte" in out
    # A small model's parameters are counted, not rounded to 0.00 M.
    count = sum(p.numel() for p in statewise.load(run).parameters())
    assert f" of width 32, {count:,} parameters, in {run}" in out.replace("\n", " ")
    assert main(["generate", run, "--prompt", "the ", "--tokens", "20", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("the ")
    assert main(["generate", run, "--prompt", "the ", "--tokens", "20", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert main(["evaluate", run]) == 0
    assert "this model" in capsys.readouterr().out
    (here / "other.txt").write_text("something else entirely, of some length")
    assert main(["evaluate", run, "--data.path", "other.txt", "--out", "f.json"]) == 0
    assert "other.txt: 39 bytes" in capsys.readouterr().out
    told = json.loads(Path("f.json").read_text())
    assert (told["text"], told["bytes"], told["baselines"]["uniform"]) == ("other.txt", 39, 8.0)
    assert told["bits_per_byte"] > 0
    assert f"rate: {run} is a language model; it takes --data.path and --chunk" in _error(
        capsys, "evaluate", run, "--rate", "0.5"
    )
    checkpoint = os.path.join(run, "checkpoints", "step-000004.safetensors")
    assert main(["evaluate", checkpoint]) == 0
    assert "held-out part of t.txt" in capsys.readouterr().out
    assert main(["generate", checkpoint, "--prompt", "the ", "--tokens", "20", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert "is finished" in _error(capsys, "run", "--resume", run)
    assert "that run is finished" in _error(capsys, *_arguments("--steps", "4"), "--out", run)
    # config.yaml starts the same run again.
    assert main(["run", "--config", os.path.join(run, "config.yaml"), "--out", "again"]) == 0
    assert _losses(Path(run)) == _losses(Path("again"))


def test_time_limit(here, capsys):
    assert main(_arguments("--steps", "100000", "--max-minutes", "0.02", "--eval-every", "100000", "--out", "r")) == 0
    out = capsys.readouterr().out
    assert "statewise run --resume r" in out.replace("\n", " ")
    first = RunDirectory("r").saved_steps()[-1]
    assert "--max-minutes: want a number" in _error(capsys, "run", "--resume", "r", "--max-minutes", "x")
    assert "--max-minutes: want a positive number" in _error(capsys, "run", "--resume", "r", "--max-minutes=0")
    assert main(["run", "--resume", "r", "--max-minutes", "0.01"]) == 0
    assert RunDirectory("r").saved_steps()[-1] > first


def test_a_loss_that_explodes_stops_the_run(here, capsys):
    arguments = _arguments("--steps", "60", "--lr", "1e30", "--clip", "0", "--checkpoint-every", "1", "--out", "r")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert re.search(
        r"error: step \d+: the loss is .*not finite in parameter group '\w+' \(.*last good checkpoint: r", err
    )
    assert err.count("\n") == 1


def test_a_full_disk_stops_the_run_and_keeps_the_old_checkpoint(here, capsys, monkeypatch):
    import errno

    from statewise.training import checkpoint_io

    real, calls = checkpoint_io.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint_io, "save_file", full)
    err = _error_of_run(capsys, _arguments("--steps", "4", "--checkpoint-every", "2", "--out", "r"))
    assert "no space left" in err
    assert "last good checkpoint: r" in err
    assert os.listdir("r/checkpoints") == ["step-000002.safetensors"]
    monkeypatch.undo()
    os.chdir(here)
    assert main(["run", "--resume", "r"]) == 0
    assert [r["step"] for r in read_metrics("r/metrics.csv") if "loss" in r] == [1, 2, 3, 4]


def _error_of_run(capsys, arguments):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


# ---- killed, interrupted, several processes ----------------------------------------------------------------------


def test_kill_minus_9_and_resume_give_the_same_losses(here):
    arguments = _arguments("--steps", "200", "--eval-every", "75", "--checkpoint-every", "25")
    assert main([*arguments, "--out", "whole"]) == 0
    process = _start([*arguments, "--out", "killed"])
    _wait_for_step(here / "killed", 60, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run = RunDirectory(here / "killed")
    saved = run.saved_steps()[-1]
    assert 50 <= saved < 200
    # What a kill in the middle of writing leaves behind.
    with open(run.metrics, "a") as f:
        f.write("199,1")
    (run.checkpoints / ".step-000199.safetensors.1.tmp").write_bytes(b"half")
    code, _, err = _finish(_start(["run", "--resume", "killed"]))
    assert code == 0, err
    assert _losses(here / "killed") == _losses(here / "whole")
    assert (here / "killed" / "model.safetensors").read_bytes() == (here / "whole" / "model.safetensors").read_bytes()
    assert not list(run.checkpoints.glob(".*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(here, number, code):
    process = _start(_arguments("--steps", "3000", "--eval-every", "3000", "--checkpoint-every", "3000", "--out", "r"))
    _wait_for_step(here / "r", 5, process)
    os.killpg(process.pid, number)
    returned, _, err = _finish(process)
    assert returned == code, err
    assert "Traceback" not in err
    (step,) = RunDirectory(here / "r").saved_steps()
    assert f"stopped and saved at step {step}; to go on: statewise run --resume r" in err
    assert read_metrics(here / "r" / "metrics.csv")[-1]["step"] == step


# Some hundred roundings, piled up over a few steps of training.
ROUNDING = 1000 * torch.finfo(torch.float32).eps


def _compare(one, two):
    """The same training on one and on two processes: sums are taken in another order, nothing else."""
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert all(abs(a[k] - b[k]) <= ROUNDING * abs(a[k]) for k in a), (a, b)


def test_two_processes_train_as_one(here):
    arguments = _arguments("--steps", "6", "--eval-every", "3", "--checkpoint-every", "3")
    assert main([*arguments, "--out", "one"]) == 0
    code, _, err = _finish(_start([*arguments, "--devices", "2", "--out", "two"]))
    assert code == 0, err
    _compare(_losses(here / "one"), _losses(here / "two"))
    assert (here / "two" / "README.md").is_file()
    # Gone on with from the middle, on two processes again.
    (here / "two" / "README.md").unlink()
    RunDirectory(here / "two").checkpoint(6).unlink()
    before = _losses(here / "two")
    code, _, err = _finish(_start(["run", "--resume", "two"]))
    assert code == 0, err
    assert _losses(here / "two") == before


@pytest.mark.slow
def test_torchrun_and_sharded_weights(here):
    arguments = _arguments("--steps", "6", "--eval-every", "3", "--checkpoint-every", "3")
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    assert main([*arguments, "--out", "one"]) == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "statewise.cli",
    ]
    for extra in (["--strategy", "ddp"], ["--strategy", "fsdp2"]):
        out = extra[1]
        done = subprocess.run(
            [*torchrun, *arguments, *extra, "--out", out], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        _compare(_losses(here / "one"), _losses(here / out))
    # Gone on with from sharded weights; from whole ones: test_two_processes_train_as_one.
    (here / out / "README.md").unlink()
    RunDirectory(here / out).checkpoint(6).unlink()
    done = subprocess.run(
        [*torchrun, "run", "--resume", out], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    _compare(_losses(here / "one"), _losses(here / out))
