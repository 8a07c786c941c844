"""What was measured, as Markdown and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._words import counted
from .bounds import NAMES, Bounds
from .cases import OURS

Row = dict[str, Any]

HOW = (
    "Every contender computed the same from the same inputs and was checked against float64 before it was timed. Times "
    "are medians of calls made in turn, with half the distance of the quartiles; `3.0x` says that the other needs 3 "
    "times as long (or as much); *of bound* is the shortest time that the rates above allow, divided by ours: it can "
    "pass 100 % where data stay in the caches."
)
_COLOURS = {OURS: "#08519c"}
_OTHERS = ("#d95f0e", "#31a354", "#756bb1", "#8c6d31", "#636363")


def quantity(value: float, unit: str = "s") -> str:
    """A time or a size with three digits and a fitting unit."""
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    for factor, name in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1 or name == "µs":
            amount = value * factor
            return f"{amount:,.{0 if amount >= 100 else 1 if amount >= 10 else 2}f} {name}"
    raise AssertionError


def ours(row: Row) -> Row:
    """The entry of this library."""
    return next(e for e in row["entries"] if e["name"] == OURS)


def ratio(row: Row, entry: Row) -> float:
    """How many times as much another needs."""
    return entry["median"] / ours(row)["median"]


def of_bound(row: Row) -> str:
    """ "62 % (exp)", or nothing where no bound was given."""
    if "bound" not in row:
        return ""
    return f"{row['bound']['seconds'] / ours(row)['median']:.0%} ({NAMES[row['bound']['by']]})"


def times(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 9.95 else 2}f}x"


def spread(entry: Row, unit: str) -> str:
    """The median, with half the distance of the quartiles if there is one to speak of."""
    half = (entry["high"] - entry["low"]) / 2 / max(entry["median"], 1e-12)
    return quantity(entry["median"], unit) + (f" ±{half:.0%}" if half >= 0.005 else "")


def peer_cell(row: Row, entry: Row) -> str:
    """Time and ratio of a peer, and a mark if it was wrong or called once only."""
    if "note" in entry:
        return entry["note"]
    marks = []
    if entry.get("doubtful"):
        marks.append(f"error {entry['error']:.1g}")
    if row["unit"] == "s" and entry["rounds"] == 1:
        marks.append("one call")
    text = f"{quantity(entry['median'], row['unit'])} ({times(ratio(row, entry))})"
    return text + (f" [{', '.join(marks)}]" if marks else "")


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table without columns that are empty in all rows."""
    keep = [i for i in range(len(head)) if any(line[i] for line in body)]
    lines = ["| " + " | ".join(head[i] for i in keep) + " |", "|" + "---|" * len(keep)]
    return lines + ["| " + " | ".join(line[i] for i in keep) + " |" for line in body]


def _section(rows: Sequence[Row]) -> list[str]:
    peers: list[str] = []
    for row in rows:
        peers += [e["name"] for e in row["entries"] if e["name"] != OURS and e["name"] not in peers]
    notes: list[str] = []
    body = []
    batches, models = {row["batch"] for row in rows}, rows[0]["suite"] == "models"
    for row in rows:
        entry, entries = ours(row), {e["name"]: e for e in row["entries"]}
        rate = f"{row['tokens'] / entry['median']:,.0f}" if row["tokens"] and models else ""
        cells = []
        for name in peers:
            cell = peer_cell(row, entries[name]) if name in entries else ""
            if name in entries and "note" in entries[name]:
                note = f"{name}: {cell.removeprefix(f'{name}: ').removeprefix(f'{name} ')}"
                notes += [note] if note not in notes else []
                cell = f"note {notes.index(note) + 1}"
            cells.append(cell)
        length = "" if row["mode"] in ("step", "decode") else f"{row['length']:,}"
        batch = f"{row['batch']}" if len(batches) > 1 or row["batch"] > 1 else ""
        body.append([row["mode"], row["dtype"], batch, length, spread(entry, row["unit"]), rate, of_bound(row), *cells])
    lines = _table(["", "dtype", "B", "L", OURS, "tokens/s", "of bound", *peers], body)
    if notes:
        lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return lines


def markdown(header: Mapping[str, Any], rows: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """The whole report, with headings from the second level down, so that it can stand on a page."""
    same, peers = header["same"], header["peers"]
    versions = {name: v for name, v in header["versions"].items() if v != "not installed"} | {
        name: v for name, v in peers.items() if v != "not installed"
    }
    absent = [name for name, v in peers.items() if v == "not installed"]
    bounds = Bounds(**header["bounds"])
    lines = [
        f"## Measured on {header['date']}",
        "",
        f"**Machine.** {same['device']}; {counted(same['threads'], 'thread')}.",
        "",
        "**Versions.** "
        + ", ".join(f"{name} {v}" for name, v in versions.items())
        + "."
        + (f" Not installed: {', '.join(absent)}." if absent else ""),
        "",
        "**Bounds, measured in the same run.** " + "; ".join(f"{what}: {rate}" for what, rate in bounds.rows()) + ".",
        "",
        f"**How to read.** {HOW}",
    ]
    sections: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        sections.setdefault((row["suite"], row["what"], row["shape"]), []).append(row)
    for (suite, what, shape), found in sections.items():
        title = {"scaling": f"{what} against length"}.get(suite, what)
        lines += ["", f"### {title}" + (f", {shape}" if shape else ""), "", *_section(found)]
    for picture in pictures:
        lines += ["", f"![{Path(picture).stem}]({picture})"]
    return "\n".join(lines) + "\n"


# ---- pictures ----------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # An own Figure, not pyplot: nothing global, no window, no change to the user's settings.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colours(names: Sequence[str]) -> dict[str, str]:
    others = [name for name in names if name not in _COLOURS]
    return _COLOURS | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}


def _peers(rows: Sequence[Row]) -> list[str]:
    found: dict[str, None] = {OURS: None}
    for row in rows:
        found |= dict.fromkeys(e["name"] for e in row["entries"] if "median" in e)
    return list(found)


def plot_scaling(rows: Sequence[Row], path: Path) -> bool:
    """Seconds against length, both logarithmic, one panel per op; a peer's line ends where it was not run any more."""
    rows = [row for row in rows if row["suite"] == "scaling"]
    ops = list(dict.fromkeys(row["what"] for row in rows))
    if not ops:
        return False
    figure, names = _figure(4.2 * len(ops), 4.2), _peers(rows)
    colours = _colours(names)
    for axes, op in zip(figure.subplots(1, len(ops), squeeze=False)[0], ops):
        for name in names:
            points = [
                (row["length"], e["median"])
                for row in rows
                for e in row["entries"]
                if row["what"] == op and e["name"] == name and "median" in e
            ]
            if points:
                bold = name == OURS
                axes.plot(
                    *zip(*sorted(points)), marker="o", ms=3.5, lw=2.2 if bold else 1.2, color=colours[name], label=name
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(op, fontsize=11)
        axes.set_xlabel("length")
        axes.set_ylabel("seconds, forward")
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": "statewise"})
    return True


def plot_ratios(rows: Sequence[Row], path: Path) -> bool:
    """How many times as long each peer needs, one line per row."""
    rows = [row for row in rows if row["suite"] != "scaling" and row["unit"] == "s" and len(_peers([row])) > 1]
    if not rows:
        return False
    names = _peers(rows)
    figure, colours = _figure(8, 1.2 + 0.24 * len(rows)), _colours(names)
    axes = figure.add_subplot()
    for name in names[1:]:
        points = [
            (ratio(row, e), i)
            for i, row in enumerate(rows)
            for e in row["entries"]
            if e["name"] == name and "median" in e
        ]
        axes.plot(*zip(*points), "o", color=colours[name], label=name, ms=5)
    axes.axvline(1, color=colours[OURS], lw=1.5)
    axes.set_xscale("log")
    labels = [
        " ".join(
            [row["what"], row["mode"], *(["bf16"] if row["dtype"] == "bfloat16" else [])]
            + ([f"B {row['batch']}"] if row["batch"] > 1 else [])
            + ([f"L {row['length']}"] if row["length"] > 1 else [])
        )
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"time of the other / time of {OURS}")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5)
    figure.savefig(path, dpi=150, metadata={"Software": "statewise"})
    return True


def write(directory: Path, header: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
    """results.md and the pictures that the rows are enough for; returns what was written."""
    written = [
        directory / name
        for name, plot in (("ratios.png", plot_ratios), ("scaling.png", plot_scaling))
        if plot(rows, directory / name)
    ]
    text = directory / "results.md"
    text.write_text(markdown(header, rows, [p.name for p in written]), encoding="utf-8")
    return [text, *written]
