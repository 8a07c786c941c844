"""`statewise evaluate RUN_DIR --data.path FILE`."""

from __future__ import annotations

import time
from pathlib import Path

from ..data.text import TextOptions
from .errors import user_errors
from .generate import load_byte_model
from .options import Options


def _texts(run_dir: str, path: str | None) -> tuple[str, bytes, bytes | None]:
    """(name, text to evaluate, text the model was trained on if the run says which)."""
    from ..data.text import load_corpus, read_documents
    from ..training.directory import read_config

    file = Path(run_dir) / "config.yaml"
    trained = None
    if file.is_file():
        data = read_config(file).get("data")
        trained = TextOptions(**data) if isinstance(data, dict) else None
    if path is not None:
        text = b"".join(read_documents(path))
        try:
            corpus = load_corpus(trained) if trained else None
        except ValueError:  # the text has moved since; the n-gram baselines then have nothing to learn from
            corpus = None
        return path, text, b"".join(corpus.train) if corpus else None
    if trained is None:
        raise ValueError(f"--data.path: {run_dir} does not say which text it was trained on; want a text file")
    corpus = load_corpus(trained)
    return f"held-out part of {corpus.name}", b"".join(corpus.held_out), b"".join(corpus.train)


def evaluate(run_dir: str, path: str | None = None, chunk: int = 4096) -> int:
    """Bits per byte of a whole text under the model of a run directory, read once with the state carried along.

    Args:
        run_dir: run directory
        path: file, directory or glob; the held-out text of the run if not given
        chunk: bytes per call of the model; changes speed and memory, not the result
    """
    with user_errors():
        model = load_byte_model(run_dir)
        name, text, train = _texts(run_dir, path)
        if len(text) < 2:
            raise ValueError(f"data.path: {name} has {len(text)} byte; want at least 2")
        if chunk < 1:
            raise ValueError(f"chunk: want at least 1, got {chunk}")
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..data.baselines import baselines, compressed_bits
    from ..inference import bits_per_token

    console = Console()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    with console.status(f"Reading {len(text):,} bytes"):
        began = time.monotonic()
        bits = bits_per_token(model, tokens, chunk=chunk)
        seconds = time.monotonic() - began
        others = baselines(train, text) if train else {"uniform": 8.0, **compressed_bits(text)}
    table = Table(min_width=36)
    table.add_column("model (lower is better)")
    table.add_column("bits per byte", justify="right")
    for key, value in sorted([*others.items(), ("this model", bits)], key=lambda row: -row[1]):
        table.add_row(key, f"{value:.3f}", style="bold green" if key == "this model" else "")
    speed = f"{len(text):,} bytes at {len(text) / seconds:,.0f} bytes/s"
    console.print(f"{name}: {speed}", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    return 0


def main(argv: list[str]) -> int:
    options = Options("evaluate", evaluate, positional=["run_dir"])
    if "--help" in argv or "-h" in argv:
        print(options.help().replace("--path TEXT     ", "--data.path TEXT"))
        return 0
    # The text is called `data.path` here as in `run`.
    argv = ["--path" + a[len("--data.path") :] if a.startswith("--data.path") else a for a in argv]
    return evaluate(**options.parse(argv))
