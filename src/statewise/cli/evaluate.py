"""`statewise evaluate RUN_DIR`: a language model on a text, or a classifier on a split of its data set."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

from .._files import write_atomically
from ..data.text import TextOptions
from .errors import UserError, check_folder, user_errors
from .generate import load_byte_model
from .options import Options

Split = Literal["test", "validation", "train"]
CHUNK = 4096


def home(run: str) -> Path:
    """The run directory of a run, or of one of its checkpoints."""
    path = Path(run)
    return path.parent.parent if path.is_file() else path


def _is_classifier(run: str) -> bool:
    from ..models._weights import CONFIG, read_config

    return (home(run) / CONFIG).is_file() and read_config(home(run))["architecture"] == "sequence_classifier"


def evaluate(
    run_dir: str,
    path: str | None = None,
    chunk: int | None = None,
    split: Split | None = None,
    rate: float | None = None,
    out: str | None = None,
) -> int:
    """Figures of a trained model: bits per byte of a text, or the accuracy of a classifier on a split of its data.

    Args:
        run_dir: run directory, or one of its checkpoints
        path: of a language model: file, directory or glob; the held-out text of the run if not given
        chunk: of a language model: bytes per call; 4096 if not given; changes speed and memory, not the result
        split: of a classifier: which rows; test if not given
        rate: of a classifier: sampling rate of its input as a share of that of training, such as 0.5 for every second
            value; the steps of its mixers are made longer by as much, and nothing is trained again
        out: a JSON file for the figures, with all digits
    """
    for_texts, for_rows = {"data.path": path, "chunk": chunk}, {"split": split, "rate": rate}
    if out is not None:
        check_folder("--out", out)
    with user_errors():
        classifier = _is_classifier(run_dir)
        for name, value in (for_texts if classifier else for_rows).items():
            if value is not None:
                kind, instead = ("classifier", for_rows) if classifier else ("language model", for_texts)
                raise ValueError(f"{name}: {run_dir} is a {kind}; it takes --{' and --'.join(instead)}")
    if classifier:
        from .evaluate_labels import evaluate_labels

        figures = evaluate_labels(run_dir, split or "test", 1.0 if rate is None else rate)
    else:
        figures = evaluate_text(run_dir, path, CHUNK if chunk is None else chunk)
    if out is not None:
        _write(Path(out), figures)
    return 0


def _write(path: Path, figures: dict[str, Any]) -> None:
    text = json.dumps(_without_nan(figures), indent=2, allow_nan=False) + "\n"
    try:
        write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from error


def _without_nan(value: Any) -> Any:
    """JSON has no number for the loss of a model that diverged; null stands for it."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- language models -----------------------------------------------------------------------------------------------


def _texts(run_dir: str, path: str | None) -> tuple[str, bytes, bytes | None]:
    """(name, text to evaluate, text the model was trained on if the run says which)."""
    from ..data.text import load_corpus, read_documents
    from ..training.directory import read_config

    file = home(run_dir) / "config.yaml"
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


def evaluate_text(run_dir: str, path: str | None, chunk: int) -> dict[str, Any]:
    """Bits per byte of a whole text, read once with the state carried along, beside baselines."""
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
    return {"run": run_dir, "text": name, "bytes": len(text), "bits_per_byte": bits, "baselines": others}


def main(argv: list[str]) -> int:
    options = Options("evaluate", evaluate, positional=["run_dir"])
    if "--help" in argv or "-h" in argv:
        print(options.help().replace("--path TEXT     ", "--data.path TEXT"))
        return 0
    # The text is called `data.path` here as in `run`.
    argv = ["--path" + a[len("--data.path") :] if a.startswith("--data.path") else a for a in argv]
    return evaluate(**options.parse(argv))
