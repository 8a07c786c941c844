"""The directory of one run. It is made once, never overwritten, and holds all that resuming needs."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from .._files import write_atomically

_STEP = re.compile(r"step-(\d+)\.safetensors")


class RunDirectory:
    """Paths inside a run directory.

    config.yaml (all options; `--config` takes it), metrics.csv, checkpoints/step-*.safetensors, and when the run ends
    model.safetensors with config.json, results.json, machine.json, curve.png, README.md and report.html.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model.safetensors"
        self.results = self.path / "results.json"
        self.machine = self.path / "machine.json"
        self.curve = self.path / "curve.png"
        self.card = self.path / "README.md"
        self.page = self.path / "report.html"

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def new(cls, recipe: str, out: str | None = None) -> RunDirectory:
        """Make `out`, or the next free runs/<recipe>-<n>.

        Raises:
            ValueError: `out` exists already, or cannot be made.
        """
        if out is not None:
            try:
                os.makedirs(out)
            except FileExistsError:
                raise ValueError(cls._taken(out)) from None
            except OSError as error:
                raise ValueError(f"out: cannot make the directory {out}: {error.strerror}") from error
            return cls(out)
        try:
            os.makedirs("runs", exist_ok=True)
            for n in count(1):
                try:
                    # mkdir is atomic: two runs that start together get different numbers.
                    os.mkdir(path := os.path.join("runs", f"{recipe}-{n}"))
                    return cls(path)
                except FileExistsError:
                    continue
        except OSError as error:
            raise ValueError(f"out: cannot make a run directory in {os.path.abspath('runs')}: {error.strerror}; "
                             f"give another place with --out") from error  # fmt: skip
        raise AssertionError("unreachable")

    @classmethod
    def _taken(cls, out: str) -> str:
        free = next(p for n in count(2) if not os.path.exists(p := f"{out.rstrip('/')}-{n}"))
        there, more = cls(out), ""
        if there.card.is_file():
            more = f"; that run is finished, see {there.card}"
        elif there.saved_steps():
            more = f", or to go on with that run: statewise run --resume {out}"
        return f"out: {out} exists already and is never overwritten; want a new name such as --out {free}{more}"

    @classmethod
    def open(cls, path: str) -> RunDirectory:
        """An existing run directory.

        Raises:
            ValueError: it is not there, or holds no config.yaml.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise ValueError(f"there is no run directory {path}{cls._others(run.path)}")
        if not run.config.is_file():
            raise ValueError(f"{path} is not a run directory: it has no config.yaml")
        return run

    @staticmethod
    def _others(path: Path) -> str:
        runs = sorted(path.parent.glob("*/config.yaml"), key=lambda p: p.stat().st_mtime)[-3:]
        return "; there is " + ", ".join(str(p.parent) for p in reversed(runs)) if runs else ""

    # ---- config ------------------------------------------------------------------------------------------------

    def write_config(self, recipe: str, options: Mapping[str, Any], header: str) -> None:
        text = f"# {header}\n" + yaml.safe_dump({"recipe": recipe, **options}, sort_keys=False, allow_unicode=True)
        write_atomically(self.config, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def read_config(self) -> dict[str, Any]:
        """Recipe and options.

        Raises:
            ValueError: not a YAML mapping with `recipe`.
        """
        return read_config(self.config)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}.safetensors"

    def saved_steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in order."""
        found = (_STEP.fullmatch(p.name) for p in self.checkpoints.glob("step-*.safetensors"))
        return sorted(int(m.group(1)) for m in found if m)

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        for path in (*self.checkpoints.glob(".*.tmp"), *self.path.glob("*.tmp")):
            path.unlink(missing_ok=True)


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """A YAML file of options."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: want a mapping of option: value, got a {type(content).__name__}")
    return content


class Metrics:
    """metrics.csv: one row per logged step, one more cell group where a validation was made.

    Rows are flushed one by one, so a killed run loses at most one. `open` drops every row after the step at which the
    run goes on (they will be written again), a row cut in half included.
    """

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self.columns = path, columns

    def open(self, step: int) -> None:
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]

        def write(temporary: str) -> None:
            with open(temporary, "w", newline="", encoding="utf-8") as f:
                csv.writer(f, lineterminator="\n").writerow(self.columns)
                for row in rows:
                    self._write(f, row)

        write_atomically(self.path, write)

    def _write(self, f: Any, row: Mapping[str, Any]) -> None:
        csv.writer(f, lineterminator="\n").writerow([_cell(row.get(c)) for c in self.columns])

    def add(self, row: Mapping[str, Any]) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as f:
            self._write(f, row)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.7g}"


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """Rows of metrics.csv: step as an int, other filled cells as floats. An incomplete last row is left out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = text.split("\n")[:-1]  # what follows the last line break is empty, or a row cut in half
    rows = []
    for row in csv.DictReader(lines):
        rows.append({k: int(v) if k == "step" else float(v) for k, v in row.items() if v})
    return rows


def times(rows: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    """(for each row the seconds of training up to it; the seconds of single steps).

    The row of a validation stands after that of its step, and the time between them is that of the validation.
    """
    clock, single = 0.0, []
    at, before = [], None
    for row in rows:
        took = row["seconds"] - (before["seconds"] if before else 0.0)
        is_step = "lr" in row
        if is_step:
            clock += took
        if is_step and before and "lr" in before and row["step"] > before["step"]:
            single.append(took / (row["step"] - before["step"]))
        at.append(clock)
        before = row
    return at, single
