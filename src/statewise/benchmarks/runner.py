"""Runs rows: forecast, check, time, keep."""

from __future__ import annotations

import fnmatch
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .._files import write_atomically
from . import machine, timing
from .bounds import Bounds, sync
from .cases import DOUBTFUL, OURS, Case, Contender, Missing

FORMAT = 1
# Seconds: after one such call of a peer nobody waits for a second, and that one is its time.
SLOW = 20.0
# Part of the free memory that a peer may be expected to need.
ROOM = 0.7
# Lengths at which a peer is tried before it meets a longer one.
PROBES = (64, 128)

Row = dict[str, Any]


class ResumeError(ValueError):
    """Results cannot be gone on with: another machine, other versions or other options."""


@dataclass(frozen=True)
class Settings:
    """How rows are timed.

    Args:
        seconds: per row, for all contenders together.
        patience: seconds a single call of a peer may take.
    """

    device: str = "cpu"
    seconds: float = 10.0
    patience: float = 120.0
    clock: timing.Clock = field(default=time.perf_counter, compare=False)


class Forecast:
    """What a call of a peer will take, from what it took at smaller lengths."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, ...], dict[int, float]] = {}

    def saw(self, family: tuple[str, ...], length: int, seconds: float) -> None:
        self._seen.setdefault(family, {})[length] = seconds

    def expect(self, family: tuple[str, ...], length: int) -> float | None:
        """Seconds at a length, by the power law through the two nearest lengths seen; None if none was seen."""
        seen = self._seen.get(family, {})
        if length in seen:
            return seen[length]
        if not seen:
            return None
        near = sorted(seen, key=lambda n: abs(math.log(n / length)))[:2]
        power = 1.0
        if len(near) == 2:
            (a, b) = near
            # Short calls are all overhead and would promise that long ones cost nothing.
            power = min(max(math.log(seen[a] / seen[b]) / math.log(a / b), 1.0), 3.0)
        return seen[near[0]] * (length / near[0]) ** power


def matches(case: Case, pattern: str) -> bool:
    """A plain word matches anywhere in the key; * and ? match as in file names. Several are separated by commas."""
    return any(
        fnmatch.fnmatchcase(case.key, p if any(c in p for c in "*?[") else f"*{p}*") for p in pattern.split(",") if p
    )


def _refusal(case: Case, name: str, family: tuple[str, ...], settings: Settings, forecast: Forecast) -> str | None:
    """Why a peer is not called at all, or None."""
    needed, free = case.memory.get(name, 0.0), machine.free_memory(settings.device)
    if needed > ROOM * free:
        return f"not run: needs {needed / 1e9:,.1f} GB or more, {free / 1e9:,.1f} GB are free"
    if case.smaller is not None and case.length > 2 * PROBES[-1] and forecast.expect(family, case.length) is None:
        for length in PROBES:
            contender = case.smaller(length).peers[name]()
            if not contender.compiles:
                forecast.saw(family, length, timing.once(contender.run, settings.clock)[1])
    expected = forecast.expect(family, case.length)
    if expected is not None and expected > settings.patience:
        return f"not run: a call is expected to take {expected:,.0f} s, from shorter rows"
    return None


def _prepare(case: Case, settings: Settings, forecast: Forecast) -> tuple[dict[str, Contender], list[Row]]:
    """Contenders that can run, and an entry with a note for each that cannot."""
    ready, notes = {OURS: case.ours()}, []
    for name, build in case.peers.items():
        try:
            refusal = _refusal(case, name, (*case.family, name), settings, forecast)
            if refusal is None:
                ready[name] = build()
            else:
                notes.append({"name": name, "note": refusal})
        except Missing as reason:
            notes.append({"name": name, "note": str(reason)})
        except Exception as error:  # whatever a peer does, the run goes on
            notes.append({"name": name, "note": _failure(name, error)})
    return ready, notes


def _failure(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{name} raised {type(error).__name__}: {text[:200]}"


def run_case(case: Case, bounds: Bounds, settings: Settings, forecast: Forecast) -> Row:
    """Check and time one row.

    Raises:
        LawError: our result is wrong. There is no row then.
    """
    if case.repeat:
        return _told(case)
    check = case.check() if case.check is not None else None
    ready, notes = _prepare(case, settings, forecast)
    first: dict[str, float] = {}
    entries: dict[str, Row] = {}
    for name, contender in list(ready.items()):
        try:
            # The first call is timed apart, and what it gives is checked.
            returned, first[name] = timing.once(lambda c=contender: _finished(c, settings.device), settings.clock)  # type: ignore[misc]
            got = contender.checked(returned) if check is not None else None
            del returned
        except Exception as error:
            if name == OURS:
                raise
            notes.append({"name": name, "note": _failure(name, error)})
            del ready[name]
            continue
        entries[name] = {"name": name, "first": first[name]}
        if check is not None and got is not None:
            if name == OURS:
                check.ours(got, case.key)
            entries[name]["error"] = check.relative_error(got)
            entries[name]["doubtful"] = not entries[name]["error"] <= DOUBTFUL
        if name != OURS and not contender.compiles:
            forecast.saw((*case.family, name), case.length, first[name])
    del check
    single = {n for n, c in ready.items() if n != OURS and not c.compiles and first[n] > SLOW}
    timings = timing.interleaved(
        {n: c.run for n, c in ready.items() if n not in single},
        settings.seconds,
        finish=lambda: sync(settings.device),
        clock=settings.clock,
    ) | {n: timing.summarise([first[n]], 1) for n in single}
    for name, found in timings.items():
        entries[name] |= asdict(found)
        if name != OURS:
            # A warm call tells more than a first one.
            forecast.saw((*case.family, name), case.length, found.median)
    return _row(case, [*entries.values(), *notes], bounds)


def _finished(contender: Contender, device: str) -> Any:
    returned = contender.run()
    sync(device)
    return returned


def _told(case: Case) -> Row:
    """A row whose contenders measure themselves (in processes of their own): the median of what they tell."""
    entries, notes = [], []
    for name, build in {OURS: case.ours, **case.peers}.items():
        try:
            contender = build()
            found = timing.summarise([float(contender.run()) for _ in range(case.repeat)], 1)
            entries.append({"name": name, **asdict(found)})
        except Missing as reason:
            notes.append({"name": name, "note": str(reason)})
        except Exception as error:
            if name == OURS:
                raise
            notes.append({"name": name, "note": _failure(name, error)})
    return _row(case, [*entries, *notes], None)


def _row(case: Case, entries: list[Row], bounds: Bounds | None) -> Row:
    found: Row = {
        "key": case.key,
        "suite": case.suite,
        "what": case.what,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape": case.shape,
        "length": case.length,
        "batch": case.batch,
        "tokens": case.tokens,
        "unit": case.unit,
        "entries": entries,
    }
    if case.needs is not None and bounds is not None:
        by, seconds = bounds.least(case.needs())
        found["bound"] = {"by": by, "seconds": seconds}
    return found


class Results:
    """results.json: what was measured on what, and the rows; whole on disk after every row.

    Args:
        path: of the file.
        header: machine, versions, options. Its "same" part must be equal for a run to be gone on with.
        resume: read the rows that are there.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path, self.header = path, dict(header)
        self.rows: list[Row] = []
        if resume and path.is_file():
            old = load(path)
            for name, value in self.header["same"].items():
                if old["header"]["same"].get(name) != value:
                    was = old["header"]["same"].get(name)
                    raise ResumeError(f"{path} was made with {name} {was!r}, now it is {value!r}; choose another --out")
            self.rows = old["rows"]

    def __contains__(self, key: str) -> bool:
        return any(row["key"] == key for row in self.rows)

    def append(self, row: Row) -> None:
        self.rows.append(row)
        text = json.dumps({"format": FORMAT, "header": self.header, "rows": self.rows}, indent=1, allow_nan=True)
        write_atomically(self.path, lambda name: Path(name).write_text(text + "\n", encoding="utf-8"))


def load(path: Path) -> dict[str, Any]:
    """Header and rows of a results file.

    Raises:
        ResumeError: not such a file, or one of another version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ResumeError(f"{path}: not a results file: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ResumeError(f"{path}: want a results file of format {FORMAT}")
    return found


def header(device: str, threads: int, peers: Mapping[str, str], bounds: Bounds, **options: Any) -> dict[str, Any]:
    """What the report says of the circumstances."""
    import torch

    same = {
        "device": machine.device_name(device),
        "threads": threads,
        "torch": str(torch.__version__),
        "statewise": dict(machine.versions())["statewise"],
        **options,
    }
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "same": same,
        "versions": dict(machine.versions()),
        "peers": dict(peers),
        "bounds": bounds.record(),
    }


def run_all(
    cases: Iterable[Case],
    results: Results,
    bounds: Bounds,
    settings: Settings,
    *,
    start: Callable[[Case], None] = lambda case: None,
    done: Callable[[Case, Row | None, str | None], None] = lambda case, row, wrong: None,
) -> list[str]:
    """Run every case that `results` does not have yet; returns what was wrong with ours, of which there is no row.

    Args:
        start: called before a row.
        done: called after it with (case, row or None, what was wrong or None).
    """
    from ..testing.tolerance import LawError

    wrong: list[str] = []
    forecast = Forecast()
    for old in results.rows:
        for entry in old["entries"]:
            if "median" in entry and entry["name"] != OURS:
                family = (old["suite"], old["what"], old["mode"], old["dtype"], str(old["batch"]), entry["name"])
                forecast.saw(family, old["length"], entry["median"])
    for case in cases:
        if case.key in results:
            continue
        start(case)
        try:
            row = run_case(case, bounds, settings, forecast)
        except Exception as error:
            # One row that went wrong must not end a run of hours.
            wrong.append(str(error) if isinstance(error, LawError) else f"{case.key}: {_failure(OURS, error)}")
            done(case, None, wrong[-1])
            continue
        results.append(row)
        done(case, row, None)
    return wrong
