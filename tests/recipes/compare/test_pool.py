import os
import signal
import sys
import threading
import time
from textwrap import dedent

import pytest
from rich.console import Console

from statewise.recipes.compare.pool import Lock, Pool, Stopped
from statewise.recipes.compare.state import DIVERGED, FINISHED, STARTED, WAITING, last_row, state_of

from .conftest import comparison, plan

# Stands for a run: what it does is in its seed.
PROGRAM = """
    import signal, sys, time, pathlib, yaml
    path = pathlib.Path(sys.argv[1])
    seed = yaml.safe_load((path / "config.yaml").read_text())["seed"]
    (path / "metrics.csv").write_text("step,seconds,val_accuracy\\n1,0.5,0.25\\n")
    if seed in (0, 9):
        # Seed 9 is of a recipe that keeps its best validation, which was not the last.
        (path / "results.json").write_text('{"val_accuracy": 0.75}' if seed else "{}")
        (path / "README.md").write_text("done")
    elif seed == 1:
        (path / "failed.json").write_text('{"message": "step 3: the loss is nan"}')
        sys.exit(2)
    elif seed == 2:
        print("statewise: error: there is no text")
        sys.exit(2)
    else:
        def save(*_):
            (path / "saved").write_text("")
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        (path / "ready").write_text("")
        time.sleep(60)
"""


@pytest.fixture
def pool(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(dedent(PROGRAM))
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    show = "{:.2f}".format
    return Pool([sys.executable, str(program)], jobs=2, threads=1, console=console, headline="accuracy", show=show)


def _done(job):
    return state_of(job.path)[0] in (FINISHED, DIVERGED)


def test_runs_that_fail_do_not_stop_the_others(tmp_path, pool):
    made = comparison(tmp_path / "c", plan(seeds=(0, 1, 2)))
    jobs = made.final_jobs("a")
    failed = pool.run("runs", jobs, _done)
    assert [state_of(job.path)[0] for job in jobs] == [FINISHED, DIVERGED, STARTED]
    assert list(failed) == ["a, seed 2"]
    assert failed["a, seed 2"].startswith("there is no text")
    told = pool.console.export_text()
    assert "a, seed 0: validation 0.25 in 0 s" in told
    assert "a, seed 1: diverged (step 3: the loss is nan)" in told
    # What is done, diverged runs among it, is not done again.
    stamps = [(job.path / "metrics.csv").stat().st_mtime_ns for job in jobs]
    pool.run("runs", jobs, _done)
    later = [(job.path / "metrics.csv").stat().st_mtime_ns for job in jobs]
    assert [a == b for a, b in zip(stamps, later)] == [True, True, False]


def test_the_validation_that_chose_is_told(tmp_path, pool):
    pool.run("runs", comparison(tmp_path / "c", plan(seeds=(9,))).final_jobs("a"), _done)
    assert "a, seed 9: validation 0.75 in 0 s" in pool.console.export_text()


def test_a_signal_lets_every_run_save_and_starts_no_other(tmp_path, pool):
    made = comparison(tmp_path / "c", plan(seeds=(5, 6, 7)))
    jobs = made.final_jobs("a")

    def stop():
        end = time.monotonic() + 30
        while not all((job.path / "ready").is_file() for job in jobs[:2]) and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped) as stopped:
        pool.run("runs", jobs, _done)
    thread.join()
    assert stopped.value.signal == signal.SIGTERM
    assert [(job.path / "saved").is_file() for job in jobs] == [True, True, False]
    assert state_of(jobs[2].path)[0] == WAITING
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_directory_of_another_run_is_not_taken(tmp_path, pool):
    made = comparison(tmp_path / "c", plan(seeds=(0,)))
    (job,) = made.final_jobs("a")
    pool.run("runs", [job], lambda job: False)
    other = made.plan.final(made.out, "a", 0, 0.5)
    with pytest.raises(ValueError, match=r"lr = 0\.01, but the comparison wants 0\.5"):
        pool.run("runs", [other], lambda job: False)


@pytest.mark.skipif(os.name != "posix", reason="no file locks on this system")
def test_one_at_a_time_works_in_a_directory(tmp_path):
    lock = Lock(tmp_path)
    with pytest.raises(ValueError, match="at work there"):
        Lock(tmp_path)
    lock.close()
    Lock(tmp_path).close()


def test_the_newest_values_are_read_from_the_end(tmp_path):
    path = tmp_path / "metrics.csv"
    assert last_row(path) == {}
    path.write_text("step,loss,val_loss\n1,2.0,\n1,,3.0\n2,1.5,\n3,1.")
    assert last_row(path) == {"step": "2", "loss": "1.5", "val_loss": "3.0"}
    path.write_text("step,loss\n" + "".join(f"{i},0.5\n" for i in range(10_000)))
    assert last_row(path) == {"step": "9999", "loss": "0.5"}
