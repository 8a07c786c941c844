"""PyTorch programs: forward.pt2, extend.pt2, step.pt2."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import _check, _folder
from ._graphs import GRAPHS, build

Form = Literal["portable", "kernels"]


def to_torch_export(
    model: Any,
    out: str | os.PathLike,
    *,
    graphs: Sequence[str] = GRAPHS,
    form: Form = "portable",
    capacity: int | None = None,
    check: bool = True,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Write a model as programs of `torch.export`, for any batch and length.

    Args:
        model: a causal language model. Programs are in float32, on the CPU.
        out: folder for GRAPH.pt2 of each graph and export.json, which describes them.
        graphs: of "forward" (tokens -> logits), "extend" (tokens, state -> logits, state) and "step" (one token).
        form: "portable" programs hold operators of PyTorch only and run wherever it runs; "kernels" programs hold
            the operators of Statewise: fast on the CPU, and `import statewise.ops` has to come before `load`.
        capacity: number of tokens that caches of attention hold. None: they grow.
        check: read the files back and compare with the model; see `ExportError`.
        force: replace files in `out`.
        say: is told about progress.

    Returns:
        The relative error of each graph; empty with check=False.

    Raises:
        FileExistsError: `out` holds something.
        ExportError: the programs do not compute what the model computes. Nothing is written.
    """
    if form not in ("portable", "kernels"):
        raise ValueError(f"export: form: want 'portable' or 'kernels', got {form!r}")
    model, target = _folder.checked(model, graphs, capacity), Path(out)
    with _folder.new_folder(target, force) as folder:
        built = []
        for kind in graphs:
            say(f"tracing {kind}")
            graph = build(model, kind, capacity=capacity, portable=form == "portable")
            torch.export.save(graph.program, folder / f"{kind}.pt2")
            built.append(graph)
        _folder.write_metadata(folder, model, "torch-export", built, ".pt2", form=form)
        errors: dict[str, float] = {}
        if check:
            say("checking")
            errors = _check.compare(model, runner(folder, graphs), graphs, capacity)
            _check.demand(errors, _check.LIMIT, os.fspath(target))
    return errors


def runner(folder: Path, kinds: Sequence[str]) -> _check.Runner:
    """The programs of a folder that we wrote. `torch.export.load` can unpickle: not for folders of others."""
    modules = {kind: torch.export.load(folder / f"{kind}.pt2").module() for kind in kinds}

    def run(kind: str, tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return (modules[kind](tokens), {}) if kind == "forward" else modules[kind](tokens, state)

    return run
