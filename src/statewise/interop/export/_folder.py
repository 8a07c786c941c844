"""What all formats share: checks of what was asked, and a folder that appears only when it is whole and right."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._names import unknown
from ...mixers.base import Causal
from ...ops import _backend, _deterministic
from ._graphs import GRAPHS, Graph

METADATA = "export.json"


def require(extra: str, *modules: str) -> None:
    """Raise ImportError that names the extra, unless all modules are installed."""
    missing = [m for m in modules if find_spec(m) is None]
    if missing:
        raise ImportError(f"export: {', '.join(missing)} is not installed: pip install statewise[{extra}]")


def checked(model: Any, graphs: Sequence[str], capacity: int | None) -> Any:
    """The model as programs are made from: see `plain_copy`."""
    if not isinstance(model, Causal) or not hasattr(model, "vocab_size"):
        raise TypeError(f"export: model: want a causal language model, got {type(model).__name__}")
    for name in graphs:
        if name not in GRAPHS:
            raise ValueError(f"export: {unknown('graph', name, GRAPHS)}")
    if not graphs:
        raise ValueError(f"export: graphs: want at least one of {', '.join(GRAPHS)}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"export: capacity: want at least 1 token, or None to grow, got {capacity}")
    if _deterministic.active() or _backend._forced or _backend._environment:
        raise ValueError(
            "export: want the automatic choice of back-ends; unset STATEWISE_BACKEND, and leave use_backend and "
            "statewise.deterministic()"
        )
    return plain_copy(model)


def plain_copy(model: Any) -> Any:
    """The model in eval mode, in float32 and on the CPU, without gradients. It shares what tensors it can."""
    # A program whose weights want gradients would trace its scans anew on every call.
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, shared).to("cpu", torch.float32).eval()


def write_metadata(folder: Path, model: Any, kind: str, graphs: Sequence[Graph], suffix: str, **more: Any) -> None:
    """export.json: the model's configuration, and names, dtypes and shapes of what each graph takes and gives."""
    described = {
        g.kind: {
            "file": f"{g.kind}{suffix}",
            "inputs": [vars(port) for port in g.inputs],
            "outputs": [vars(port) for port in g.outputs],
        }
        for g in graphs
    }
    content = {"format": kind, **more, "config": model.file_config(), "graphs": described}
    (folder / METADATA).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_existing(path: Path, force: bool) -> None:
    if path.exists() and not force and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists; want another name, or force=True (--force) to replace what it holds")


@contextmanager
def new_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder beside `out` to write into. On success its files move to `out`; on failure nothing is left."""
    refuse_existing(out, force)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: want a folder, got a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        out.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
