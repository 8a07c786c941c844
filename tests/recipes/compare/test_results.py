import csv
import io
import json
import statistics
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from scipy import stats

from statewise.recipes.compare import collect, tables, write_report
from statewise.recipes.compare.comparison import Comparison
from statewise.recipes.compare.plot import mean_curve, plot
from statewise.recipes.compare.results import interval, step_time, times, tune
from statewise.training.directory import read_metrics

from .conftest import comparison, diverge, finish, metrics, plan


def _final(made, label):
    return made.final_jobs(label)


@pytest.fixture
def whole(tmp_path):
    """Two models, three seeds, all finished; the figure of b is 0.1, 0.2, 0.3 above that of a."""
    made = comparison(tmp_path / "c", plan())
    for i, (a, b) in enumerate(zip(_final(made, "a"), _final(made, "b"))):
        finish(a, [0.3, 0.4 + i / 100], final=0.5, memory=(100, 350 + i))
        finish(b, [0.8, 0.7], final=0.6 + i / 10)
    return made


def test_the_interval_is_that_of_students_t():
    for n in (2, 3, 7, 31):
        values = [float(i * i % 7) for i in range(n)]
        spread = statistics.stdev(values) / n**0.5
        want = stats.t.interval(0.95, n - 1, statistics.fmean(values), spread)
        assert interval(values) == pytest.approx(want, rel=1e-3)
    assert interval([1.0]) is None


def test_validations_are_not_training_time(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(metrics([0.1, 0.2], step_seconds=0.5, validation_seconds=3.0))
    at, single = times(read_metrics(path))
    assert at[-1] == pytest.approx(20.0)  # 40 steps of half a second; six seconds of validation are left out
    assert single == pytest.approx([0.5] * len(single))


def test_slow_first_steps_say_nothing_of_the_time_of_a_step():
    assert step_time([9.0] * 4 + [1.0] * 3 + [2.0] * 2) == 1.0
    assert step_time([5.0, 1.0, 1.0]) == 1.0
    assert step_time([]) is None


def test_figures_of_a_model(whole):
    report = collect(whole)
    b, a = report.summaries  # higher is better, so b comes first
    assert (b.model, a.model) == ("b", "a")
    assert b.values == {0: 0.6, 1: 0.7, 2: 0.8}
    assert (b.mean, b.spread) == (pytest.approx(0.7), pytest.approx(0.1))
    assert a.spread == 0.0
    assert a.memory_bytes == 252  # the most of all seeds, beyond what was held before
    assert a.step_seconds == pytest.approx(0.5)
    assert a.training_seconds == pytest.approx(20.0)
    run = report.runs[0]
    assert (run.best, run.best_step, run.last, run.final) == (0.4, 40, 0.4, 0.5)
    worse = report.runs[3]
    assert (worse.best, worse.best_step, worse.last) == (0.8, 20, 0.7)
    assert report.baselines == pytest.approx({"majority": 0.25, "chance": 0.1})


def test_differences_are_taken_seed_by_seed(whole):
    (difference,) = collect(whole).differences
    assert (difference.model, difference.reference, difference.n, difference.better) == ("a", "b", 3, 0)
    assert difference.mean == pytest.approx(-0.2)
    low, high = stats.t.interval(0.95, 2, -0.2, 0.1 / 3**0.5)
    assert difference.interval == pytest.approx((low, high), rel=1e-3)
    assert not difference.told_apart  # three seeds do not tell them apart, far apart as they are


def test_lower_is_better_where_the_task_says_so(tmp_path):
    made = comparison(tmp_path / "c", plan(seeds=(0,)), lower=True)
    finish(_final(made, "a")[0], [2.0, 1.5], name="loss", final=1.5)
    finish(_final(made, "b")[0], [1.0, 1.2], name="loss", final=1.2)
    report = collect(made)
    assert [s.model for s in report.summaries] == ["b", "a"]
    assert (report.runs[1].best, report.runs[1].best_step) == (1.0, 20)
    assert report.differences[0].better == 0
    assert report.differences[0].interval is None


def test_a_run_that_diverged_is_counted_and_left_out_of_the_mean(tmp_path):
    made = comparison(tmp_path / "c", plan())
    for i, job in enumerate(_final(made, "a")):
        diverge(job) if i == 1 else finish(job, [0.4, 0.5], final=0.5)
    report = collect(made)
    a = next(s for s in report.summaries if s.model == "a")
    assert (a.diverged, a.missing, list(a.values)) == (1, 0, [0, 2])
    notes = "\n".join(report.notes)
    assert "a: 1 of 3 runs diverged" in notes
    assert "b: 3 of 3 runs are not finished" in notes
    assert report.runs[1].message == "step 21: the loss is nan"
    for i, job in enumerate(_final(made, "b")):
        finish(job, [0.4, 0.5], final=0.6 + i / 10)
    (difference,) = collect(made).differences  # over the seeds that both finished
    assert (difference.n, difference.mean) == (2, pytest.approx(-0.2))
    assert report.summaries[-1].mean is None


def test_validation_chooses_the_learning_rate_and_the_edge_is_flagged(tmp_path):
    made = comparison(tmp_path / "c", plan(lrs=(1e-3, 1e-2, 1e-1)))
    for job, value in zip(made.tuning_jobs("a"), (0.2, 0.5, 0.4)):
        finish(job, [0.9, value])  # an earlier validation does not count
    low, middle, high = made.tuning_jobs("b")
    finish(low, [0.1, 0.7])
    finish(middle, [0.1, 0.6])
    assert made.tuning("b").chosen is None  # not all have ended
    assert made.final_jobs("b") == []
    diverge(high)
    assert (made.tuning("a").chosen, made.tuning("a").at_edge) == (1e-2, False)
    assert (made.tuning("b").chosen, made.tuning("b").at_edge) == (1e-3, True)
    assert {job.lr for job in made.final_jobs("b")} == {1e-3}
    for values, rate in (((0.5, 0.5, 0.4), 1e-3), ((0.1, 0.5, 0.5), 1e-2)):  # of equal ones the more careful
        runs = [replace(made.read(job), chosen=value) for job, value in zip(made.tuning_jobs("a"), values)]
        assert tune("a", runs, lower_is_better=False).chosen == rate
        assert tune("a", [replace(r, chosen=-r.chosen) for r in runs], lower_is_better=True).chosen == rate
    notes = "\n".join(collect(made).notes)
    assert "the last validation of each run chose" in notes
    assert "b: the best learning rate, 0.001, is at the edge of the grid" in notes
    assert "a: the best" not in notes


def test_where_a_recipe_keeps_the_best_step_its_validation_chooses(tmp_path):
    made = comparison(tmp_path / "c", plan(lrs=(1e-3, 1e-2, 1e-1)))
    for job, kept, last in zip(made.tuning_jobs("a"), (0.9, 0.6, 0.5), (0.2, 0.6, 0.4)):
        finish(job, [kept, last], kept=kept, final=0.5)
    tuning = made.tuning("a")
    assert tuning.chosen == 1e-3
    assert tuning.tried == [(1e-3, 0.9), (1e-2, 0.6), (1e-1, 0.5)]
    report, written = write_report(made)
    assert "the best validation of each run chose" in "\n".join(report.notes)
    assert "The best validation of each run; the chosen rate is marked" in written[4].read_text()


def test_no_rate_that_trains(tmp_path):
    made = comparison(tmp_path / "c", plan(lrs=(1e-3, 1e-2)))
    for job in made.tuning_jobs("a"):
        diverge(job)
    assert made.final_jobs("a") == []
    report, written = write_report(made)  # where nothing is finished there is a report all the same
    assert "a: no learning rate of the grid gave a finished run" in "\n".join(report.notes)
    assert all(path.stat().st_size > 0 for path in written)


def test_minutes_become_steps_by_the_measured_speed(tmp_path):
    made = comparison(tmp_path / "c", plan(minutes=1.0))
    assert [job.model for job in made.speed_jobs()] == ["a", "b"]
    assert made.final_jobs("a") == []
    folder = made.plan.speed(made.out, "a").path
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(metrics([0.1], step_seconds=0.25))
    assert [job.model for job in made.speed_jobs()] == ["a", "b"]  # five seconds: it was stopped before its time
    (folder / "metrics.csv").write_text(metrics([0.1], step_seconds=0.25, every=80))
    assert [job.model for job in made.speed_jobs()] == ["b"]
    assert made.speed_jobs()[0].config["lr"] < 1e-9  # nothing diverges while it is measured
    config = made.final_jobs("a")[0].config
    # 60 s in steps of a quarter; warm-up and validations keep their share of what were 40 steps.
    assert (config["steps"], config["warmup"], config["eval_every"]) == (240, 24, 120)


class Visits:
    """A pool whose short runs make one step of twenty seconds a visit."""

    def __init__(self, end):
        self.visits, self.told, self.end = [], [], end

    def run(self, title, jobs, done, *, alone=False, told=None):
        failed = {}
        for job in [job for job in jobs if not done(job)]:
            if title == "speed":
                self.visits.append(job.model)
                if self.end(job, self.visits.count(job.model)):
                    failed[job.name] = "lost"
                elif told is not None:
                    self.told.append(told(job))
        return failed


def _step(job, n):
    job.path.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{i},{20 * i},1.0,0.01\n" for i in range(1, n + 1))
    (job.path / "metrics.csv").write_text(f"step,seconds,loss,lr\n{rows}")


def test_a_first_step_that_takes_all_the_time_is_followed_by_a_second(tmp_path):
    made = comparison(tmp_path / "c", plan(minutes=2.0))
    pool = Visits(_step)
    made.carry_out(pool)
    assert pool.visits == ["a", "b", "a", "b"]
    assert made.final_jobs("a")[0].config["steps"] == 6
    made.carry_out(pool)
    assert len(pool.visits) == 4


def test_a_short_run_that_fails_is_not_tried_twice_in_one_call(tmp_path):
    made = comparison(tmp_path / "c", plan(minutes=2.0))
    pool = Visits(lambda job, n: None)
    made.carry_out(pool)
    assert pool.visits == ["a", "b"]


def test_a_short_run_that_fails_first_and_is_measured_then_has_not_failed(tmp_path):
    def end(job, n):
        _step(job, n)
        return job.model == "a" and n == 1

    made = comparison(tmp_path / "c", plan(minutes=2.0))
    pool = Visits(end)
    assert made.carry_out(pool) == {}
    assert pool.visits == ["a", "b", "a", "b"]
    assert pool.told == ["begun, to be measured in a second visit"]


def test_a_model_that_diverges_before_it_learns_is_reported_as_diverged(tmp_path):
    made = comparison(tmp_path / "c", plan(seeds=(0,), minutes=2.0))
    pool = Visits(lambda job, n: diverge(job, ()) if job.model == "a" else _step(job, n))
    made.carry_out(pool)
    (job,) = made.final_jobs("a")
    assert job.config["steps"] == 40
    diverge(job, ())
    assert "a: 1 of 1 runs diverged; it has no figure" in "\n".join(collect(made).notes)


def test_notes_say_what_was_not_equal(tmp_path):
    made = comparison(tmp_path / "c", plan(), parameters=(1000, 3000))
    assert "b has 3.00 times the parameters of a" in "\n".join(collect(made).notes)
    for i, job in enumerate(_final(made, "a")):
        finish(job, [0.4, 0.5])
        machine = json.loads((job.path / "machine.json").read_text())
        (job.path / "machine.json").write_text(json.dumps(machine | {"threads": i + 1}))
    notes = "\n".join(collect(made).notes)
    assert "Times are not comparable" in notes
    assert "(a machine, 1 thread; a machine, 2 threads; a machine, 3 threads)" in notes


def test_the_mean_curve_covers_what_all_seeds_cover(whole):
    runs = [r for r in collect(whole).runs if r.model == "a"]
    steps, seconds, values = mean_curve(runs)
    assert list(steps) == [20, 40]
    assert list(seconds) == pytest.approx([10.0, 20.0])
    assert list(values) == pytest.approx([0.3, 0.41])


def test_all_files_of_a_report(whole):
    report, written = write_report(whole)
    assert all(path.stat().st_size > 0 for path in written)
    text, numbers, everything, picture, page = written
    assert "| b | 70.0% ± 10.0% | 60.0%, 70.0%, 80.0% | 1,010 | 5 M |" in text.read_text()
    rows = list(csv.DictReader(io.StringIO(numbers.read_text())))
    assert [(r["model"], r["seed"], r["final"]) for r in rows][3:] == [
        ("b", "0", "0.6"),
        ("b", "1", "0.7"),
        ("b", "2", "0.8"),
    ]
    content = json.loads(everything.read_text())
    assert content["models"][0]["mean"] == report.summaries[0].mean
    assert content["differences"][0]["told_apart"] is False
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "70.0% ± 10.0%" in page.read_text()
    assert "<script" not in page.read_text()
    assert "`" not in page.read_text()
    assert "<code>--lrs</code> tries a grid" in page.read_text()
    assert tables.screen(report).row_count == 4
    # Nothing but the directory is needed.
    again = [p.read_bytes() for p in written]
    assert [p.read_bytes() for p in write_report(Comparison.open(whole.out))[1]] == again


def test_names_of_baselines_stand_beside_the_panels_and_make_room(whole, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for value in (0.25, 0.26):  # nearer than a line is high
        report = replace(collect(whole), baselines={"chance": value, "majority": 0.25})
        plot(report, whole.out / "compare.png")
    left, middle, right = drawn[-1].axes
    assert not left.texts
    assert not middle.texts
    assert {text.get_text() for text in right.texts} == {"chance", "majority"}
    heights = sorted(text.get_position()[1] for text in right.texts)
    assert heights[1] - heights[0] > 0.04
    assert all(text.get_position()[0] > 1 for text in right.texts)
    assert all(step == round(step) for step in left.get_xticks())


def test_data_in_a_page_is_escaped(tmp_path):
    made = comparison(tmp_path / "c", plan(seeds=(0,)))
    job = _final(made, "a")[0]
    finish(job, [0.5, 0.5])
    (job.path / "results.json").write_text(json.dumps({"baselines": {"<script>alert(1)</script>": 0.5}}))
    text = write_report(made)[1][4].read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_damaged_files_are_named(tmp_path):
    made = comparison(tmp_path / "c", plan())
    for content in ("", "[]", "{}", '{"headline": "x", "lower_is_better": true, "models": {"a": {}}}'):
        (made.out / "models.json").write_text(content)
        with pytest.raises(ValueError, match=r"models\.json"):
            Comparison.open(made.out)
