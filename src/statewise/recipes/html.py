"""Pages of one file: style and pictures are inside, nothing is fetched and no script runs. All data is escaped."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --paper: #ffffff; --mark: #08519c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117; --mark: #6cb6ff } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin: 0 0 .2rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
.soft { color: var(--soft) } .figure { font-size: 2.4rem; font-weight: 650; color: var(--mark) }
.wide { overflow-x: auto } figure { display: inline-block; margin: 0 1.5rem 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600; color: var(--soft) } tr.faint td { color: var(--soft) }
tr.best td { font-weight: 650; color: var(--mark) }
img { max-width: 100%; background: #ffffff; border-radius: 6px }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: color-mix(in srgb, var(--ink) 6%, transparent);
  padding: .8rem 1rem; border-radius: 6px; font-size: .9rem }
.bar { display: inline-block; height: .7rem; background: var(--line); border-radius: 2px }
.bar.best { background: var(--mark) }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Even if an escape were forgotten, a browser would run and load nothing.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            f"<h1>{escape(title)}</h1>",
            *body,
            "</html>",
            "",
        ]
    )


def text(content: str, kind: str = "") -> str:
    return f'<p class="{escape(kind)}">{escape(content)}</p>'


def heading(content: str) -> str:
    return f"<h2>{escape(content)}</h2>"


def code(content: str) -> str:
    return f"<pre>{escape(content)}</pre>"


def items(notes: Iterable[str]) -> str:
    """A list; what stands between two pairs of asterisks is bold, and between backticks code, as in Markdown."""
    return "<ul>" + "".join(f"<li>{_marked(note)}</li>" for note in notes) + "</ul>"


def _marked(note: str) -> str:
    parts = escape(note).split("**")
    bold = "".join(f"<strong>{part}</strong>" if i % 2 else part for i, part in enumerate(parts))
    return re.sub("`([^`]+)`", r"<code>\1</code>", bold)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], styles: Mapping[int, str] | None = None) -> str:
    """Rows of plain text. styles: number of a row -> "best" or "faint"."""
    lines = ['<div class="wide"><table>']
    if any(head):
        lines.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
    for i, row in enumerate(rows):
        kind = (styles or {}).get(i, "")
        lines.append(f'<tr class="{escape(kind)}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table></div>"])


def facts(pairs: Mapping[str, Any]) -> str:
    """A table of two columns; nested mappings become "a.b"."""
    return table(("", ""), [(name, str(value)) for name, value in _flat(pairs)])


def _flat(pairs: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in pairs.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{name}.")
        elif value is not None:
            yield f"{above}{name}", value


def bars(values: Mapping[str, float], shown: Mapping[str, str], best: str) -> str:
    """Names, bars from zero and values; `best` stands out."""
    most = max([*values.values(), 1e-12])
    rows = []
    for name, value in values.items():
        kind = "best" if name == best else ""
        width = f"{max(value, 0) / most * 16:.2f}rem"
        rows.append(
            f'<tr class="{kind}"><td>{escape(name)}</td><td><span class="bar {kind}" style="width:{width}"></span></td>'
            f"<td>{escape(shown[name])}</td></tr>"
        )
    return '<div class="wide"><table>' + "\n".join(rows) + "</table></div>"


def picture(path: Path, what: str) -> str:
    """A PNG inside the page; nothing if there is no file."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'


def figure(drawing: str, caption: str) -> str:
    """An SVG that the caller made, under its caption; several stand side by side."""
    return f'<figure><figcaption class="soft">{escape(caption)}</figcaption>{drawing}</figure>'


def link(target: str, what: str) -> str:
    """To a file beside the page."""
    return f'<a href="{escape(target)}">{escape(what)}</a>'
