"""`statewise bench`: how fast this library is on this machine, side by side with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from .console import terminal
from .errors import UserError
from .options import Options

SUITES = ("ops", "models", "scaling")


def bench(
    suite: str = "ops",
    only: str = "*",
    lengths: str = "",
    seconds: float = 10.0,
    patience: float = 120.0,
    threads: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    out: str = "bench",
    quick: bool = False,
    resume: bool = False,
) -> int:
    """Time this library and others in turn on the same inputs, after checking every result against float64. SUITE is
    ops (the default), models, scaling or all. OUT gets results.json after every row, and results.md and pictures in
    the end.

    Args:
        suite: ops, models, scaling or all
        only: rows whose name matches, e.g. 'ssd', '*forward/float32*' or several with commas between
        lengths: sequence lengths with commas between, instead of those of the suite
        seconds: time for each row, for all contenders together; slow ones are called three times at least
        patience: others that are expected to take more seconds than this for one call are not run
        threads: 0 leaves it to PyTorch
        device: where
        out: directory for the results
        quick: short rows, small models and few calls, to see that everything works
        resume: go on with the results in OUT
    """
    from ..benchmarks import bounds, peers, report, runner

    chosen, wanted = _suites(suite), _lengths(lengths)
    if seconds <= 0 or patience <= 0 or threads < 0:
        raise UserError("--seconds and --patience: want more than 0; --threads: want 0 or more")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU")
    directory = Path(out)
    path = directory / "results.json"
    if path.exists() and not resume:
        raise UserError(f"{path} is there; --resume goes on with it, or choose another --out")
    cases = [case for name in chosen for case in _rows(name, device, wanted, quick) if runner.matches(case, only)]
    if not cases:
        raise UserError(f"--only: nothing in {' '.join(chosen)} matches {only!r}")
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        console = terminal()
        found = peers.installed(device)
        for name, version in found.items():
            console.print(f"{name}: {version}", highlight=False)
        with console.status("Measuring this machine"):
            limits = bounds.measure(device, 0.05 if quick else 0.4)
        for what, rate in limits.rows():
            console.print(f"{what}: {rate}", highlight=False)
        console.print()
        settings = runner.Settings(device, min(seconds, 0.3) if quick else seconds, patience)
        header = runner.header(device, torch.get_num_threads(), found, limits, quick=quick)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            results = runner.Results(path, header, resume=resume)
        except runner.ResumeError as error:
            raise UserError(str(error)) from error
        wrong = _run(console, cases, results, limits, settings)
    finally:
        torch.set_num_threads(before)
    if results.rows:
        for written in [path, *report.write(directory, results.header, results.rows)]:
            console.print(f"written: {written}", highlight=False)
    for message in wrong:
        console.print(f"[bold red]wrong:[/] {message}", highlight=False)
    return 1 if wrong else 0


def _run(console: Any, cases: list[Any], results: Any, limits: Any, settings: Any) -> list[str]:
    from rich.markup import escape

    from ..benchmarks import report, runner
    from ..benchmarks.cases import OURS

    status = console.status("")
    left = [case for case in cases if case.key not in results]
    counted = {case.key: i for i, case in enumerate(left, 1)}

    def done(case: Any, row: Any, wrong: str | None) -> None:
        if row is None:
            console.print(f"[bold red]{case.key}: wrong[/]", highlight=False)
            return
        entry = report.ours(row)
        bound = report.of_bound(row)
        parts = [f"[bold]{case.key}[/]  {report.spread(entry, row['unit'])}" + (f", {bound}" if bound else "")]
        for other in row["entries"]:
            if other["name"] != OURS:
                text = escape(report.peer_cell(row, other).removeprefix(f"{other['name']}: "))
                parts.append(f"[dim]{other['name']}: {text}[/]" if "note" in other else f"{other['name']}: {text}")
        console.print("; ".join(parts), highlight=False, soft_wrap=True)

    with status:
        return runner.run_all(
            left,
            results,
            limits,
            settings,
            start=lambda case: status.update(f"{counted[case.key]} of {len(left)}: {case.key}"),
            done=done,
        )


def _rows(suite: str, device: str, lengths: list[int] | None, quick: bool) -> Any:
    from importlib import import_module

    return import_module(f"...benchmarks.{suite}", __name__).rows(device, lengths, quick)


def _suites(name: str) -> list[str]:
    if name == "all":
        return list(SUITES)
    if name not in SUITES:
        raise UserError(f"SUITE: want {', '.join(SUITES)} or all, got {name!r}")
    return [name]


def _lengths(text: str) -> list[int] | None:
    if not text:
        return None
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UserError(f"--lengths: want numbers above 0 with commas between, e.g. 128,1024; got {text!r}")
    return found


def main(argv: list[str]) -> int:
    options = Options("bench", bench, positional=["suite"], switches=["quick", "resume"])
    if "--help" in argv or "-h" in argv:
        print(options.help())
        return 0
    return bench(**options.parse(argv))
