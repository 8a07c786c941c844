"""ONNX: forward.onnx, extend.onnx, step.onnx, which share one file of weights."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _check, _folder
from ._graphs import GRAPHS, Graph, build

WEIGHTS = "weights.data"
# Smaller constants stay in the graph, where shape inference and fusions look at them.
_SMALL = 1024


def to_onnx(
    model: Any,
    out: str | os.PathLike,
    *,
    graphs: Sequence[str] = GRAPHS,
    capacity: int | None = None,
    check: bool = True,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Write a model as ONNX graphs in float32, for any batch and length.

    Inputs are `tokens` (int64) and, for "extend" and "step", one `state.NAME` for each tensor of the state; outputs
    `logits` and `new_state.NAME`. The state before the first token is zeros. Complex states are pairs (..., 2).

    Args:
        model: a causal language model.
        out: folder for GRAPH.onnx of each graph, weights.data, which they share, and export.json.
        graphs: of "forward" (tokens -> logits), "extend" (tokens, state -> logits, state) and "step" (one token).
        capacity: number of tokens that caches of attention hold; the oldest are lost after that. None: they grow.
        check: read the files back and compare with the model, in ONNX Runtime.
        force: replace files in `out`.
        say: is told about progress.

    Returns:
        The relative error of each graph; empty with check=False.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        FileExistsError: `out` holds something.
        ExportError: the graphs do not compute what the model computes. Nothing is written.
    """
    _folder.require("onnx", "onnx", "onnxscript", *(["onnxruntime"] if check else []))
    model, target = _folder.checked(model, graphs, capacity), Path(out)
    with _folder.new_folder(target, force) as folder:
        built, store = [], _Weights(folder / WEIGHTS)
        for kind in graphs:
            say(f"tracing {kind}")
            graph = build(model, kind, capacity=capacity)
            say(f"translating {kind}")
            _write(graph, folder, store, model)
            built.append(graph)
        _folder.write_metadata(folder, model, "onnx", [_prefixed(g) for g in built], ".onnx")
        errors: dict[str, float] = {}
        if check:
            say("checking in ONNX Runtime")
            errors = _check.compare(model, runner(folder, graphs), graphs, capacity)
            _check.demand(errors, _check.LIMIT, os.fspath(target))
    return errors


def _prefixed(graph: Graph) -> Graph:
    """Names as in the files: state and new state need two."""
    inputs = tuple(replace(p, name=p.name if p.name == "tokens" else f"state.{p.name}") for p in graph.inputs)
    outputs = tuple(replace(p, name=p.name if p.name == "logits" else f"new_state.{p.name}") for p in graph.outputs)
    return replace(graph, inputs=inputs, outputs=outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of libraries that are not there and of its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write(graph: Graph, folder: Path, store: _Weights, model: Any) -> None:
    import onnx_ir as ir

    named = _prefixed(graph)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph.program,
            input_names=[p.name for p in named.inputs],
            output_names=[p.name for p in named.outputs],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    written = program.model
    _name_sizes(written, named)
    for value in written.graph.initializers.values():
        value.const_value = store.keep(value.const_value)
    for node in written.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of the machine that exported
    written.metadata_props.update({"statewise.config": json.dumps(model.file_config()), "statewise.graph": graph.kind})
    written.producer_name, written.producer_version = "statewise", model.file_config()["statewise_version"]
    ir.save(written, folder / f"{graph.kind}.onnx")


def _name_sizes(written: Any, graph: Graph) -> None:
    """`batch`, `length` and `cache` instead of the tracer's symbols, everywhere."""
    import onnx_ir as ir

    symbols: dict[str, str] = {}
    for value, port in zip(written.graph.inputs, graph.inputs):
        for size, name in zip(value.shape, port.shape):
            if isinstance(name, str) and isinstance(size, ir.SymbolicDim):
                symbols[str(size.value)] = name
    inner = [v for node in written.graph.all_nodes() for v in node.outputs]
    for value in [*written.graph.inputs, *inner]:
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and size.value is not None and not value.shape.frozen:
                value.shape[axis] = re.sub(r"\b[su]\d+\b", lambda m: symbols.get(m[0], m[0]), size.value)


class _Weights:
    """One file of tensors for several graphs: what is equal is written once."""

    def __init__(self, path: Path):
        self.path = path
        self.at: dict[bytes, int] = {}  # hash of the content -> where it begins

    def keep(self, tensor: Any) -> Any:
        """The tensor as a place in the file."""
        import onnx_ir as ir

        if tensor.nbytes < _SMALL:
            return tensor
        data = tensor.tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self.at:
            with open(self.path, "ab") as file:
                file.write(b"\0" * (-file.tell() % 64))
                self.at[key] = file.tell()
                file.write(data)
        return ir.ExternalTensor(
            self.path.name, self.at[key], len(data), tensor.dtype, shape=tensor.shape, name=tensor.name,
            base_dir=self.path.parent,
        )  # fmt: skip


def runner(folder: Path, kinds: Sequence[str]) -> _check.Runner:
    """The graphs of a folder in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    sessions = {
        kind: onnxruntime.InferenceSession(folder / f"{kind}.onnx", options, providers=["CPUExecutionProvider"])
        for kind in kinds
    }

    def run(kind: str, tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        given = {"tokens": tokens.numpy(), **{f"state.{name}": t.numpy() for name, t in state.items()}}
        outputs = zip((o.name for o in sessions[kind].get_outputs()), sessions[kind].run(None, given))
        named = {name.removeprefix("new_state."): torch.from_numpy(value) for name, value in outputs}
        return named.pop("logits"), named

    return run
