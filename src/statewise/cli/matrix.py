"""`statewise matrix MODEL --out m.png`: pictures of what the mixers of a model do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .console import terminal
from .errors import UserError, check_folder, user_errors
from .looking import Look, What, look_at, numbers
from .options import Options

TABLE_ROWS = 12


def matrix(
    model: str,
    out: str | None = None,
    what: What = "matrix",
    layer: int | None = None,
    head: str | None = None,
    length: int | None = None,
    text: str | None = None,
    tokens: str | None = None,
    documents: str | None = None,
    d_model: int = 64,
    seed: int = 0,
) -> int:
    """Show what the mixers of a model do: a table, and a PNG with --out.

    Args:
        model: run directory, checkpoint of a run, directory with a model; or, with random weights, the name of a model
            or mixer of `statewise list`, or a mixer with options such as '{"name": "mamba2", "d_state": 16}'
        out: picture to write, a .png
        what: matrix (which input goes into which output), influence (the same by gradients, for any mixer), impulse
            and transfer (responses of a time-invariant mixer), spectrum (decays and time scales), memory (influence
            by distance), state (its norm while reading)
        layer: which mixer of the model, from 0; for memory, influence and state the whole model if not given, for the
            others 0
        head: heads or channels to show, with commas between; some of them if not given
        length: how many tokens to read; longer input is cut. 128 if not given; of a row of data all, up to 1,024
        text: what a language model reads; some English (for bytes) or random tokens if not given. The run of a
            classifier reads a validation row of its data where that has been made, other classifiers random
            tokens or values, and mixers by name random values
        tokens: the same as token numbers with commas between
        documents: lengths of documents that lie side by side in the input, with commas between
        d_model: width of a mixer given by name
        seed: of random weights and inputs
    """
    with user_errors():
        if length is not None and length < 2:
            raise ValueError(f"--length: want at least 2 tokens, got {length}")
        if out is not None:
            _check_out(out)
        look = look_at(model, what, layer, length, text, tokens, documents, d_model, seed)
        figure, table, note = _VIEWS[what](look, numbers("head", head), out is not None)
        if out is not None:
            from ..analysis import save

            save(figure, out)
    console = terminal()
    console.print(table)
    if note:
        console.print(note, highlight=False)
    if out is not None:
        print(f"wrote {out}")
    return 0


def _check_out(out: str) -> None:
    """Before anything is computed."""
    if Path(out).suffix.lower() != ".png":
        raise ValueError(f"--out: want a file name that ends in .png, got {out}")
    check_folder("--out", out)


# ---- the views: a figure (only if one is written), a table, and a line below it --------------------------------------


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", min_width=36)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows[:TABLE_ROWS]:
        table.add_row(*row)
    if len(rows) > TABLE_ROWS:
        table.add_row(f"... {len(rows) - TABLE_ROWS} more", *[""] * (len(columns) - 1))
    return table


def _number(value: Any) -> str:
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _only(what: str, look: Look, kind: Any, instead: str) -> None:
    if not isinstance(look.subject, kind):
        raise UserError(f"--what {what}: {look.name} {instead}")


def _time_invariant(what: str, look: Look) -> None:
    from ..mixers.base import Causal, HasImpulse, HasMixing

    view = "matrix" if isinstance(look.subject, HasMixing) else "influence"
    if not isinstance(look.subject, Causal):
        _only(what, look, HasImpulse, f"looks ahead, which a response to one input leaves out; --what {view} has both")
    _only(what, look, HasImpulse, f"has no response that is the same for all inputs; --what {view} shows one input")


def _matrix(look: Look, heads: list[int] | None, draw: bool) -> tuple[Any, Any, str]:
    from ..analysis import mixing_matrices, plot_matrices
    from ..mixers.base import HasMixing

    _only("matrix", look, HasMixing, "is not one matrix times one value; --what influence shows it by gradients")
    view = replace(mixing_matrices(look.subject, look.x, look.seg, heads=heads or 6), what=look.name)
    rows = [
        [str(h), _number(lag), f"{100 * own:.0f} %", _number(rank)]
        for h, lag, own, rank in zip(view.heads, view.mean_lag, view.diagonal_share, view.rank)
    ]
    table = _table(look.name, ["head", "mean lag", "on the diagonal", "effective rank"], rows)
    return plot_matrices(view) if draw else None, table, f"{len(rows)} of {view.total} heads, {look.read}"


def _influence(look: Look, heads: list[int] | None, draw: bool) -> tuple[Any, Any, str]:
    from ..analysis import plot_influence

    view = _gradients(look, heads)
    return plot_influence(view) if draw else None, _reaches(view), _read(look, view)


def _memory(look: Look, heads: list[int] | None, draw: bool) -> tuple[Any, Any, str]:
    from ..analysis import plot_memory

    view = _gradients(look, heads)
    return plot_memory(view) if draw else None, _reaches(view), _read(look, view)


def _gradients(look: Look, heads: list[int] | None) -> Any:
    from ..analysis import memory

    if heads is not None:
        raise ValueError("--head: outputs are looked at as a whole here; it is for matrix, impulse and transfer")
    return memory(look.subject, look.x, seg=look.seg, what=look.name)


def _reaches(view: Any) -> Any:
    rows = [[f"{share:.0%}", f"{view.reach(share):,}"] for share in (0.5, 0.9, 0.99)]
    return _table(view.what, ["share of the influence of the past", "lies within so many tokens"], rows)


def _read(look: Look, view: Any) -> str:
    return look.read + (", looks ahead as well" if view.looks_ahead else "")


def _impulse(look: Look, heads: list[int] | None, draw: bool) -> tuple[Any, Any, str]:
    from ..analysis import impulse_response, plot_impulse

    _time_invariant("impulse", look)
    view = replace(impulse_response(look.subject, look.x.shape[1]), what=look.name)
    rows = [
        [label, _number(view.taps.abs().amax(-1).quantile(q)), _number(view.reach(0.5).double().quantile(q)),
         _number(view.reach(0.99).double().quantile(q))]
        for label, q in (("low (10 %)", 0.1), ("median", 0.5), ("high (90 %)", 0.9))
    ]  # fmt: skip
    table = _table(look.name, [view.things, "largest tap", "half of the energy", "99 % of the energy"], rows)
    return (
        plot_impulse(view, heads) if draw else None,
        table,
        f"energies in tokens, of a response over {look.x.shape[1]}",
    )


def _transfer(look: Look, heads: list[int] | None, draw: bool) -> tuple[Any, Any, str]:
    from ..analysis import plot_transfer, transfer_function

    _time_invariant("transfer", look)
    view = replace(transfer_function(look.subject), what=look.name)
    size = view.gain.abs()
    parts = [size[:, 0], size[:, size.shape[1] // 2], size[:, -1], size.amax(1)]
    rows = [
        [label, *(_number(part.quantile(q)) for part in parts)]
        for label, q in (("low (10 %)", 0.1), ("median", 0.5), ("high (90 %)", 0.9))
    ]  # fmt: skip
    table = _table(look.name, [view.things, "gain at 0", "in the middle", "at the highest", "largest"], rows)
    return plot_transfer(view, heads) if draw else None, table, "" if view.exact else "from a response that is cut off"


def _spectrum(look: Look, heads: list[int] | None, draw: bool) -> tuple[Any, Any, str]:
    from ..analysis import plot_spectrum, spectrum

    if heads is not None:
        raise ValueError("--head: a spectrum shows all heads; it is for matrix, impulse and transfer")
    try:
        view = replace(spectrum(look.subject, look.x, look.seg), what=look.name)
    except TypeError as error:
        why = str(error).removeprefix("spectrum: mixer: ")
        raise UserError(f"--what spectrum: {why}; --what memory works for all") from error
    except ValueError as error:  # a state too large to linearise
        why = str(error).removeprefix("spectrum: mixer: ")
        instead = "--what memory works for all; or a smaller --d-model"
        raise UserError(f"--what spectrum: {why}; {instead}") from error
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    rows = [[f"{share:.0%}", _number(value)] for share, value in zip(shares, view.quantiles(shares))]
    table = _table(look.name, ["share of the state", "forgets to 1/e within tokens"], rows)
    over = "" if view.source == "time-invariant" else f" over {look.read}"
    note = f"{view.source}{over}, {view.eigenvalues.numel():,} values, {100 * view.unstable_share:.1f} % above one"
    return plot_spectrum(view) if draw else None, table, note


def _state(look: Look, heads: list[int] | None, draw: bool) -> tuple[Any, Any, str]:
    from ..analysis import plot_states, state_norms
    from ..mixers.base import Causal

    if heads is not None:
        raise ValueError("--head: a state is shown as a whole; it is for matrix, impulse and transfer")
    _only("state", look, Causal, "looks ahead, so it has no state; --what influence shows what it does")
    view = replace(state_norms(look.subject, look.x, look.seg), what=look.name)
    rows = [
        [name, f"{int(size[-1]):,}", _number(norm[0]), _number(norm.max()), _number(norm[-1])]
        for name, norm, size in zip(view.names, view.norms, view.sizes)
    ]
    table = _table(look.name, ["part of the state", "numbers", "norm at first", "largest", "at last"], rows)
    return plot_states(view) if draw else None, table, look.read


_VIEWS = {
    "matrix": _matrix,
    "influence": _influence,
    "impulse": _impulse,
    "transfer": _transfer,
    "spectrum": _spectrum,
    "memory": _memory,
    "state": _state,
}


def main(argv: list[str]) -> int:
    options = Options("matrix", matrix, positional=["model"])
    if "--help" in argv or "-h" in argv:
        print(options.help())
        return 0
    return matrix(**options.parse(argv))
