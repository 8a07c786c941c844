"""The benchmark: timing with a clock of our own, what may become a row, peers that fail, going on after a stop."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from statewise.benchmarks import models, ops, report, runner, scaling, timing
from statewise.benchmarks.bounds import Bounds
from statewise.benchmarks.cases import DOUBTFUL, OURS, Case, Check, Contender, Missing
from statewise.benchmarks.peers import whole
from statewise.cli import main
from statewise.models.language import LanguageModel
from statewise.testing.tolerance import assert_agree

BOUNDS = Bounds(bytes=1e10, exp=1e9, float32=1e11, bfloat16=1e12)


class Time:
    """A clock that moves only when somebody works."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def work(self, name, *seconds):
        """A function that takes the given times one after the other, the last for ever."""
        left = list(seconds)

        def run():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_everyone_is_called_in_turn():
    clock = Time()
    found = timing.interleaved({"a": clock.work("a", 1.0), "b": clock.work("b", 1.0)}, 10.0, clock=clock)
    assert clock.calls == ["a", "b"] * 6  # one call apart, then five rounds
    assert (found["a"].rounds, found["b"].rounds) == (5, 5)


def test_a_slow_one_gets_fewer_rounds_spread_over_the_run_and_never_less_than_three():
    clock = Time()
    found = timing.interleaved({"fast": clock.work("f", 0.5), "slow": clock.work("s", 30.0)}, 20.0, clock=clock)
    assert (found["fast"].rounds, found["slow"].rounds) == (20, 3)
    counted = "".join(clock.calls[2:])
    assert [len(part) for part in counted.split("s")] == [7, 7, 6, 0]


def test_the_call_apart_does_not_count_and_the_median_is_robust():
    clock = Time()
    work = clock.work("a", 7.0, 1.0, 1.0, 50.0, 1.0, 2.0, 2.0)
    found = timing.interleaved({"a": work}, 42.0, clock=clock)["a"]
    assert found.rounds == 6
    assert found.median == pytest.approx(1.5)
    assert found.low == pytest.approx(1.0)
    assert found.high == pytest.approx(2.0)


def test_short_calls_are_timed_many_at_once():
    clock = Time()
    found = timing.interleaved({"a": clock.work("a", 1e-5)}, 0.01, clock=clock)["a"]
    assert found.calls == 100
    assert found.median == pytest.approx(1e-5)
    assert len(clock.calls) == 1 + found.rounds * found.calls


def test_work_that_was_only_started_is_waited_for():
    clock = Time()

    def finish():
        clock.now += 2.0

    found = timing.interleaved({"a": clock.work("a", 1.0)}, 9.0, finish=finish, clock=clock)["a"]
    assert found.median == pytest.approx(3.0)


def test_the_forecast_follows_a_power_law():
    forecast = runner.Forecast()
    assert forecast.expect(("op",), 100) is None
    forecast.saw(("op",), 64, 1.0)
    assert forecast.expect(("op",), 128) == pytest.approx(2.0)
    forecast.saw(("op",), 128, 4.0)
    assert forecast.expect(("op",), 1024) == pytest.approx(4.0 * 8**2)
    forecast.saw(("op",), 256, 4.0)  # overhead only: longer rows are not for nothing
    assert forecast.expect(("op",), 1024) == pytest.approx(16.0)
    assert forecast.expect(("op",), 128) == pytest.approx(4.0)


# ---- what becomes a row ----------------------------------------------------------------------------------------------


def case(peers=None, ours=None, truth=1.0, **options):
    """A row that doubles 0.5."""
    x = torch.full((3,), 0.5)
    doubled = {"y": torch.full((3,), truth, dtype=torch.float64)}

    def contender(run):
        return lambda: Contender(run, lambda out: {"y": out})

    def build(run):
        return run if isinstance(run, Missing) else contender(run)

    return Case(
        **{"suite": "test", "what": "double", "mode": "forward", "dtype": "float32", "shape": "3", "length": 3}
        | options,
        ours=contender(ours or (lambda: 2 * x)),
        peers={name: build(run) for name, run in (peers or {}).items()},
        check=lambda: Check(doubled, {"y": x + x}, doubled, 4.0),
    )


def run(given, settings=None, forecast=None):
    return runner.run_case(given, BOUNDS, settings or runner.Settings(seconds=0.01), forecast or runner.Forecast())


def results(tmp_path, resume=False, threads=1):
    header = {"date": "2026-01-01", "same": {"device": "a cpu", "threads": threads}, "versions": {"torch": "2"},
              "peers": {"other": "not installed"}, "bounds": BOUNDS.record()}  # fmt: skip
    return runner.Results(tmp_path / "results.json", header, resume=resume)


def test_a_wrong_result_of_ours_is_no_row(tmp_path):
    file = results(tmp_path)
    bad = case(ours=lambda: torch.full((3,), 1.001), what="bad")
    wrong = runner.run_all([bad, case()], file, BOUNDS, runner.Settings(seconds=0.01))
    assert len(wrong) == 1
    assert "test/bad/forward" in wrong[0]
    assert "against float64" in wrong[0]
    assert [row["what"] for row in file.rows] == ["double"]


def test_a_crash_of_ours_does_not_end_the_run(tmp_path):
    def crash():
        raise RuntimeError("no")

    file = results(tmp_path)
    wrong = runner.run_all([case(ours=crash, what="bad"), case()], file, BOUNDS, runner.Settings(seconds=0.01))
    assert wrong == ["test/bad/forward/float32/B1/L3: statewise raised RuntimeError: no"]
    assert [row["what"] for row in file.rows] == ["double"]


def test_a_lacking_or_unfinished_result_of_ours_is_refused():
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="computed"):
        Check({"y": x.double(), "state": x.double()}, {"y": x}, {"y": x}, 4.0).ours({"y": x}, "row")
    with pytest.raises(AssertionError, match="not finite"):
        Check({"y": x.double()}, {"y": x}, {"y": x.double()}, 4.0).ours({"y": x / 0}, "row")


def test_peers_that_fail_become_notes_and_wrong_ones_are_marked():
    def crash():
        raise RuntimeError("needs\n a GPU")

    row = run(
        case(
            {
                "good": lambda: torch.ones(3),
                "off": lambda: torch.full((3,), 1.1),
                "nan": lambda: torch.full((3,), math.nan),
                "crash": crash,
            }
        )
    )
    found = {entry["name"]: entry for entry in row["entries"]}
    assert found["crash"]["note"] == "crash raised RuntimeError: needs a GPU"
    assert not found["good"]["doubtful"]
    assert found["off"]["doubtful"]
    assert found["off"]["error"] > DOUBTFUL
    assert found["nan"]["doubtful"]
    assert {"median", "low", "high", "rounds", "calls", "first", "error"} <= found[OURS].keys()


def test_a_missing_peer_is_a_note():
    def absent():
        raise Missing("other: not installed")

    given = case()
    row = run(replace(given, peers={"other": absent}))
    assert row["entries"][1] == {"name": "other", "note": "other: not installed"}


def test_a_peer_without_memory_or_patience_is_not_called():
    called = []

    def peer():
        called.append(1)
        return torch.ones(3)

    row = run(replace(case({"big": peer}), memory={"big": 1e18}))
    assert row["entries"][1]["note"].startswith("not run: needs 1,000,000,000.0 GB")
    forecast = runner.Forecast()
    slow = replace(case({"slow": peer}), length=4096)
    forecast.saw((*slow.family, "slow"), 1024, 100.0)
    row = run(slow, runner.Settings(seconds=0.01, patience=60), forecast)
    assert row["entries"][1]["note"] == "not run: a call is expected to take 400 s, from shorter rows"
    assert not called


def test_a_peer_is_tried_on_short_rows_before_a_long_one():
    clock, lengths = Time(), []

    def at(length):
        def peer():
            lengths.append(length)
            clock.now += length**2 / 1000
            return torch.ones(3)

        return replace(case({"loop": peer}), length=length, smaller=at)

    row = run(at(8192), runner.Settings(seconds=0.01, clock=clock))
    assert lengths == list(runner.PROBES)
    assert row["entries"][1]["note"] == "not run: a call is expected to take 67,109 s, from shorter rows"


def test_a_very_slow_call_is_not_repeated():
    clock, calls = Time(), []

    def peer():
        calls.append(1)
        clock.now += 30.0
        return torch.ones(3)

    def ours():
        clock.now += 0.001
        return torch.ones(3)

    row = run(case({"slow": peer}, ours), runner.Settings(seconds=0.01, clock=clock))
    entry = row["entries"][1]
    assert (len(calls), entry["rounds"], entry["median"]) == (1, 1, 30.0)
    assert "one call" in report.peer_cell(row, entry)


# ---- results ---------------------------------------------------------------------------------------------------------


def test_results_survive_the_file_and_done_rows_are_skipped(tmp_path):
    settings, started = runner.Settings(seconds=0.01), []
    file = results(tmp_path)
    runner.run_all([case({"nan": lambda: torch.full((3,), math.nan)}, what="a")], file, BOUNDS, settings)
    again = results(tmp_path, resume=True)
    assert json.dumps(again.rows) == json.dumps(file.rows)
    assert not list(tmp_path.glob(".*"))
    runner.run_all([case(what="a"), case(what="b")], again, BOUNDS, settings, start=lambda c: started.append(c.what))
    assert started == ["b"]
    assert [row["what"] for row in runner.load(again.path)["rows"]] == ["a", "b"]


def test_results_of_other_circumstances_are_not_gone_on_with(tmp_path):
    runner.run_all([case()], results(tmp_path), BOUNDS, runner.Settings(seconds=0.01))
    with pytest.raises(runner.ResumeError, match="made with threads 1, now it is 2"):
        results(tmp_path, resume=True, threads=2)
    (tmp_path / "results.json").write_text('{"format": 0}')
    with pytest.raises(runner.ResumeError, match="format"):
        results(tmp_path, resume=True)


def test_the_report(tmp_path):
    clock = Time()

    def ours():
        clock.now += 0.002
        return torch.ones(3)

    def peer():
        clock.now += 0.008
        return torch.full((3,), 1.1)

    def absent():
        raise Missing("third: not installed")

    given = case({"other": peer}, ours, what="scan", suite="scaling", length=512)
    given = replace(given, needs=lambda: {"bytes": 1e7, "exp": 1e5}, peers={**given.peers, "third": absent})
    file = results(tmp_path)
    runner.run_all([given], file, BOUNDS, runner.Settings(seconds=0.1, clock=clock))
    written = report.write(tmp_path, file.header, file.rows)
    assert [p.name for p in written] == ["results.md", "scaling.png"]
    text = written[0].read_text()
    assert "| forward | float32 | 512 | 2.00 ms | 50% (bandwidth) | 8.00 ms (4.00x) [error 0.1] | note 1 |" in text
    assert "1. third: not installed" in text
    assert "Not installed: other." in text
    assert "memory bandwidth (c = a + b, arrays larger than the caches): 10.0 GB/s" in text
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert report.plot_ratios([{**file.rows[0], "suite": "ops"}], tmp_path / "ratios.png")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(2.5, "s", "2.50 s"), (0.0123, "s", "12.3 ms"), (4.2e-5, "s", "42.0 µs"), (2e-8, "s", "0.02 µs"),
     (1234.0, "s", "1,234 s"), (4.12e8, "bytes", "412 MB"), (2.5e9, "bytes", "2.50 GB")],
)  # fmt: skip
def test_quantities(value, unit, text):
    assert report.quantity(value, unit) == text


# ---- ops -------------------------------------------------------------------------------------------------------------

SMALL = {"selective_scan": (6, 4), "ssd": (4, 5, 3), "diagonal_ssm": (5, 4)}
BY_TITLE = {op.title: op for op in ops.catalogue()}


def small(title, batch=2):
    op = BY_TITLE[title]
    return replace(op, size=SMALL.get(title, 7), batch=batch)


@pytest.mark.parametrize("title", [name for name, op in BY_TITLE.items() if op.forgets])
def test_windows_give_what_the_whole_row_gives(title):
    """The truth of a long row looks at both ends only; in float64 that is the truth of the whole row."""
    length, kind = 2 * ops.WINDOW + 300, torch.float64
    op = small(title)
    inputs = op.inputs(2, length, kind, "cpu")
    dy = ops._direction(op, 2, length, kind, "cpu")
    for mode in (ops.FORWARD, ops.BOTH):
        check = ops._truth(op, inputs, mode, dy if mode == ops.BOTH else None)
        whole_row = ops._contender(lambda i: lambda: op.spec.reference(**i), inputs, mode, dy, False)
        got = check.cut(whole_row.result(whole_row.run()))
        assert got.keys() == check.truth.keys()
        assert any(name.startswith("grad") for name in got) == (mode == ops.BOTH)
        for name, truth in check.truth.items():
            assert_agree(got[name], truth, f"{title}, {mode}: {name}", length)


@pytest.mark.parametrize("title", BY_TITLE)
def test_our_ops_pass_and_peers_agree(title):
    for mode in BY_TITLE[title].modes:
        given = ops.row(small(title), mode, 21)
        row = run(given)
        assert set(given.peers) | {OURS} == {entry["name"] for entry in row["entries"]}
        assert row["bound"]["seconds"] > 0
        for entry in row["entries"]:
            if "note" in entry:
                assert "not installed" in entry["note"]
            # The parallel scan of mambapy takes no complex conjugates in its gradient.
            elif (title, mode, entry["name"]) == ("linear_scan complex", ops.BOTH, "mambapy"):
                assert entry["doubtful"]
            else:
                assert not entry["doubtful"], f"{given.key}: {entry}"


def test_a_wrong_kernel_gets_no_row(tmp_path):
    op = small("linear_scan")
    right = op.spec.run

    def off(**inputs):
        y, state = right(**inputs)
        return y * (1 + 1e-4), state

    wrong = replace(op, spec=replace(op.spec, run=off))
    file = results(tmp_path)
    found = runner.run_all([ops.row(wrong, ops.FORWARD, 21)], file, BOUNDS, runner.Settings(seconds=0.01))
    assert "linear_scan/forward" in found[0]
    assert not file.rows


def test_every_row_has_a_name_of_its_own():
    cases = [c for suite in (ops, models, scaling) for quick in (True, False) for c in suite.rows(quick=quick)]
    keys = {c.key for c in cases}
    assert {"ops/ssd/forward/bfloat16/B1/L8192", "scaling/ssd/forward/float32/B1/L1048576"} <= keys
    assert {"models/mamba-130m/prefill/float32/B1/L1024", "models/mamba2-130m/decode/bfloat16/B64/L1"} <= keys
    for suite in (ops, models, scaling):
        found = [c.key for c in suite.rows()]
        assert len(found) == len(set(found))


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["mamba", "mamba2"])
def model(request):
    options = {"d_state": 16} if request.param == "mamba" else {"d_state": 16, "head_dim": 32}
    built = LanguageModel(
        101, 64, 2, mixer={"name": request.param, **options} if request.param == "mamba2" else "mamba", pad_vocab_to=8
    )
    built.config["mixer"] = request.param
    with torch.no_grad():
        for name, p in built.named_parameters():
            if name.endswith((".D", "norm.weight", "conv1d.bias")):
                p.add_(0.1 * torch.randn_like(p))
    return built.eval()


def _peers(model):
    for name, build in whole.BUILDERS.items():
        pytest.importorskip("transformers" if name == "accelerated" else name)
        if (name, model.config["mixer"]) != ("mambapy", "mamba2"):
            yield name, build(model)


def test_whole_models_of_others_have_our_weights(model):
    ours, tokens = whole.Ours(model), torch.randint(0, 101, (2, 20))
    with torch.no_grad():
        want, last = model(tokens[:, :-1])[:, -1], model(tokens)[:, -1]
        for name, theirs in [("statewise", ours), *_peers(model)]:
            assert_agree(theirs.prefill(tokens[:, :-1]), want, f"{name}: prefill", 20)
            theirs.start(tokens[:, :-1])
            assert_agree(theirs.step(tokens[:, -1]), last, f"{name}: step", 20)
    want = models._grads(ours, tokens)
    for name, theirs in _peers(model):
        for part, gradient in models._grads(theirs, tokens).items():
            assert_agree(gradient.reshape(want[part].shape), want[part], f"{name}: {part}", 20)


def test_llama_cpp_has_our_weights(model):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    from statewise.benchmarks.peers.llama import LlamaCpp

    theirs, tokens = LlamaCpp(model), torch.randint(0, 101, (1, 20))
    with torch.no_grad():
        assert_agree(theirs.prefill(tokens[:, :-1]), model(tokens[:, :-1])[:, -1], "prefill", 20)
        assert_agree(theirs.step(tokens[:, -1]), model(tokens)[:, -1], "step", 20)


def test_model_rows(monkeypatch):
    subject = models.Subject("mamba2-130m", n_layer=1, vocab_size=64)
    for given in (models.prefill(subject, 20), models.decode(subject, 2), models.training(subject, 20)):
        row = run(replace(given, peers={}))
        assert row["tokens"] in (20, 2)
        assert row["entries"][0]["error"] < DOUBTFUL
        assert row["bound"]["seconds"] > 0
    # A model that forgets a layer is found.
    monkeypatch.setattr(whole.Ours, "prefill", lambda self, tokens: self.start(tokens[:, 1:]))
    from statewise.testing.tolerance import LawError

    given = models.prefill(subject, 20)
    truth = given.check()
    monkeypatch.undo()
    with pytest.raises(LawError, match="logits"):
        run(replace(given, peers={}, check=lambda: truth))


def test_a_process_of_its_own_tells_what_it_cost():
    subject = models.Subject("mamba2-130m", n_layer=1, vocab_size=64)
    given = models._told(subject, models.MEMORY[models.PREFILL], models.PREFILL, 8, "peak", [])
    row = run(given)
    assert row["unit"] == "bytes"
    assert row["entries"][0]["median"] > 1e7


# ---- the command -----------------------------------------------------------------------------------------------------


def test_bench_from_beginning_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "--quick", "--only", "ops/short_conv/forward/*", "--out", "b"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "transformers: " in text
    assert "llama.cpp: " in text
    assert "memory bandwidth" in text
    found = json.loads((tmp_path / "b" / "results.json").read_text())
    assert [row["key"] for row in found["rows"]] == ["ops/short_conv/forward/float32/B1/L128"]
    assert [entry["name"] for entry in found["rows"][0]["entries"]] == [OURS, "torch Conv1d"]
    assert {"same", "versions", "peers", "bounds", "date"} <= found["header"].keys()
    assert (tmp_path / "b" / "results.md").read_text().startswith("## Measured on 20")
    assert (tmp_path / "b" / "ratios.png").is_file()
    assert main(arguments) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert json.loads((tmp_path / "b" / "results.json").read_text()) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["opps"], "SUITE: want ops, models, scaling or all"),
        (["--lengths", "12,x"], "--lengths: want numbers above 0"),
        (["--lengths", "0"], "--lengths: want numbers above 0"),
        (["--seconds", "0"], "--seconds and --patience: want more than 0"),
        (["--only", "nothing", "--quick"], "--only: nothing in ops matches 'nothing'"),
        (["--device", "tpu"], "--device: want cpu|cuda"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "said before anything is measured"


def test_help_is_readable(capsys):
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert "SUITE is" in text
    assert "--quick      " in text
    assert "BOOL" not in text
