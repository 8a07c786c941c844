"""`statewise list [PATTERN]`: models, mixers and recipes, one line each."""

from __future__ import annotations

import fnmatch
import inspect
import re

from .console import terminal
from .errors import UserError


def _matches(pattern: str, name: str) -> bool:
    # A plain word matches anywhere in the name.
    return fnmatch.fnmatchcase(name, pattern if any(c in pattern for c in "*?[") else f"*{pattern}*")


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,}"


def _source(doc: str) -> str:
    """The paper's identifier in the "Source:" part of a docstring, or the whole of it."""
    found = re.search(r"Source:\s*(.+?)(?:\n\n|\Z)", doc, re.S)
    if not found:
        return ""
    text = " ".join(found.group(1).split())
    papers = re.findall(r"arXiv[: ]\d{4}\.\d{4,5}", text)
    return ", ".join(papers) or text.rstrip(".")


def _rows() -> dict[str, list[tuple[str, str, str, str]]]:
    from .. import mixers, recipes
    from ..models import list_models, model_card

    models = []
    for name in list_models():
        card = model_card(name)
        models.append((name, _count(card.parameters), card.summary, f"{card.paper}, {card.year}"))
    layers = []
    for name in mixers.names():
        doc = inspect.getdoc(mixers.mixer_class(name)) or ""
        layers.append((name, "", doc.split("\n")[0].rstrip("."), _source(doc)))
    runs = []
    for name in recipes.names():
        doc = inspect.getdoc(recipes.get(name)) or ""
        runs.append((name, "", doc.split("\n\n")[0].replace("\n", " ").rstrip("."), _source(doc)))
    return {"models": models, "mixers": layers, "recipes": runs}


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(
            "usage: statewise list [PATTERN]\n\nModels, mixers and recipes whose name matches, e.g. mamba2 or 'mamba*'."
        )
        return 0
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        raise UserError(f"list: want at most one pattern, got {' '.join(argv)}")
    pattern = argv[0] if argv else "*"
    from rich.table import Table

    out = terminal()
    found = False
    for title, rows in _rows().items():
        kept = [row for row in rows if _matches(pattern, row[0])]
        if not kept:
            continue
        found = True
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        table.add_column(no_wrap=True, min_width=26)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for row in kept:
            table.add_row(*row)
        out.print(table)
        out.print()
    if not found:
        raise UserError(f"list: nothing matches {pattern!r}; `statewise list` shows all")
    return 0
