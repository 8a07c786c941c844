"""`statewise export MODEL --format onnx --out FOLDER`: a model for other programs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from .errors import UserError, user_errors
from .options import Options

# Options that only some formats have, with their defaults.
_OF = {"graphs": ("onnx", "torch-export"), "capacity": ("onnx", "torch-export"), "form": ("torch-export",)}
_OF |= {"dtype": ("gguf",), "tokenizer": ("gguf",)}


def export(
    model: str,
    format: Literal["onnx", "torch-export", "gguf"] | None = None,
    out: str | None = None,
    graphs: str = "forward,extend,step",
    capacity: int | None = None,
    form: Literal["portable", "kernels"] = "portable",
    dtype: Literal["f32", "f16", "bf16"] | None = None,
    tokenizer: str | None = None,
    no_check: bool = False,
    force: bool = False,
) -> int:
    """Write a model for other programs: ONNX graphs, PyTorch programs, or a GGUF file for llama.cpp.

    Args:
        model: run directory, checkpoint of a run, directory with a model, or Hub name
        format: what to write
        out: folder for onnx and torch-export, file for gguf
        graphs: onnx and torch-export: which of forward, extend and step, with commas between
        capacity: onnx and torch-export: tokens that caches of attention hold; they grow if not given
        form: torch-export: portable (operators of PyTorch only) or kernels (those of Statewise, faster on CPU)
        dtype: gguf: of the matrices; that of the model if not given
        tokenizer: gguf: folder with a Hugging Face tokenizer.json
        no_check: do not read the result back and compare it with the model
        force: replace what is there
    """
    if format is None or out is None:
        raise UserError(f"--{'out' if format else 'format'} is missing (see statewise export --help)")
    asked: dict[str, Any] = {"graphs": graphs, "capacity": capacity, "form": form, "dtype": dtype}
    asked["tokenizer"] = tokenizer
    defaults = {"graphs": "forward,extend,step", "form": "portable"}
    for name, formats in _OF.items():
        if format not in formats and asked[name] != defaults.get(name):
            raise UserError(f"--{name}: is an option of {' and '.join(formats)}, not of {format}")
    options = {name: value for name, value in asked.items() if format in _OF[name]}
    if "graphs" in options:
        options["graphs"] = tuple(graphs.split(","))
    from ..interop.export import ExportError

    with user_errors():
        built = _load(model)
        try:
            errors = _writer(format)(built, out, check=not no_check, force=force, say=_say, **options)
        except (ImportError, NotImplementedError, ExportError) as error:
            raise UserError(str(error)) from error
    for name, difference in errors.items():
        print(f"{name}: relative error {difference:.1e}")
    print(f"wrote {out}" + ("" if errors else ", not checked"))
    return 0


def _load(model: str) -> Any:
    from ..inference import load_run
    from ..models import load

    path = Path(model)
    return load_run(path) if path.is_file() or (path / "checkpoints").is_dir() else load(model)


def _writer(format: str) -> Callable:
    from ..interop import export as interop

    writers: dict[str, Callable] = {"onnx": interop.to_onnx, "torch-export": interop.to_torch_export}
    return writers.get(format, interop.to_gguf)


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    options = Options("export", export, positional=["model"], switches=["no_check", "force"])
    if "--help" in argv or "-h" in argv:
        print(options.help())
        return 0
    return export(**options.parse(argv))
