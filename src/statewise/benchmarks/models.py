"""Rows for whole language models: prefill, decoding, training, peak memory and the first call of a process."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import create_model
from ..ops import use_backend
from ..testing.tolerance import disturbed
from .cases import OURS, Case, Check, Contender, Missing, Tensors
from .peers import want, whole

MODELS = ("mamba-130m", "mamba2-130m")
BATCHES = (1, 8, 64)
PROMPT = 16  # tokens before the decoding that is timed
PROBE = 64  # tokens on which gradients are checked: a float64 gradient of 1024 would take tens of gigabytes
TELLS = 3  # processes per figure of a fresh process
# The largest of the ops' factors: a model is a chain of them.
FACTOR = 4.0
PREFILL, DECODE, TRAIN = "prefill", "decode", "training step"
FIRST, START = "first call", "start to first logits"
MEMORY = {PREFILL: "peak memory, prefill", TRAIN: "peak memory, training step"}
# Gradients that are compared: from the first layer to the last, through everything between.
WATCHED = ("embedding.weight", "layers.0.mixer.in_proj.weight", "layers.0.mixer.A_log", "norm_f.weight")


@dataclass(frozen=True)
class Subject:
    """A model with random weights; the same for the same values."""

    name: str
    dtype: str = "float32"
    device: str = "cpu"
    n_layer: int = 0
    vocab_size: int = 0

    def build(self, *, empty: bool = False) -> Any:
        """The model, or with `empty` its shapes without memory for weights."""
        overrides = {"n_layer": self.n_layer, "vocab_size": self.vocab_size}
        with torch.random.fork_rng(devices=[]), torch.device("meta" if empty else "cpu"):
            torch.manual_seed(0)
            model = create_model(self.name, **{k: v for k, v in overrides.items() if v})
        return model if empty else model.to(self.device, getattr(torch, self.dtype)).eval()


def tokens(model: Any, batch: int, length: int, device: Any = None) -> Tensor:
    """(B, L) on the device of the model or another, the same every time."""
    generator = torch.Generator().manual_seed(3)
    found = torch.randint(0, model.config["vocab_size"], (batch, length), generator=generator)
    return found.to(model.embedding.weight.device if device is None else device)


@lru_cache(maxsize=1)
def _model(subject: Subject) -> Any:
    return subject.build()


@lru_cache(maxsize=3)
def _theirs(name: str, subject: Subject) -> Any:
    if name == "llama.cpp":
        if subject.device != "cpu":
            raise Missing("llama.cpp: only its CPU side is compared")
        from .peers.llama import LlamaCpp

        return LlamaCpp(_model(subject))
    return whole.BUILDERS[name](_model(subject))


def _who(name: str, subject: Subject) -> Any:
    return whole.Ours(_model(subject)) if name == OURS else _theirs(name, subject)


# ---- the truth -------------------------------------------------------------------------------------------------------


def _exact(model: Any) -> Any:
    return copy.deepcopy(model).double()


def _near(model: Any) -> Any:
    near, generator = _exact(model), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in near.parameters():
            p.copy_(disturbed(p, generator))
    return near


def _check(subject: Subject, compute: Callable[[Any], Tensors]) -> Check:
    """What the plain definition gives in float64, in the dtype of the model, and from weights off by one rounding."""
    model = _model(subject)
    with use_backend("reference"):
        return Check(compute(_exact(model)), compute(model), compute(_near(model)), FACTOR)


def _no_grad(compute: Callable[[Any], Tensors]) -> Callable[[Any], Tensors]:
    def run(model: Any) -> Tensors:
        with torch.no_grad():
            return compute(model)

    return run


# ---- what is timed ---------------------------------------------------------------------------------------------------


def _prefill(subject: Subject, length: int, name: str) -> Contender:
    who, given = _who(name, subject), tokens(_model(subject), 1, length)

    def run() -> Tensor:
        with torch.no_grad():
            return who.prefill(given)

    return Contender(run, lambda out: {"logits": _as(out, subject)}, compiles=name == OURS)


def _as(logits: Tensor, subject: Subject) -> Tensor:
    return logits.detach().to(getattr(torch, subject.dtype))


def _decode(subject: Subject, batch: int, name: str) -> Contender:
    who, given = _who(name, subject), tokens(_model(subject), batch, PROMPT + 1)
    with torch.no_grad():
        who.start(given[:, :PROMPT])
    token = given[:, PROMPT]

    def run() -> Tensor:
        with torch.no_grad():
            return who.step(token)

    return Contender(run, lambda out: {"logits": _as(out, subject)}, compiles=name == OURS)


def _grads(who: Any, given: Tensor) -> Tensors:
    watched = {name: who.parameter(name) for name in WATCHED}
    found = torch.autograd.grad(who.loss(given), list(watched.values()))
    return {f"grad {name}": g.reshape(p.shape) for (name, p), g in zip(watched.items(), found)}


def _training(subject: Subject, length: int, name: str) -> Contender:
    who, given = _who(name, subject), tokens(_model(subject), 1, length)
    if isinstance(who, whole.Transformers):
        who.model.train()
    parameters = list((who.model if hasattr(who, "model") else who).parameters())

    def run() -> float:
        loss = who.loss(given)
        torch.autograd.grad(loss, parameters)
        return float(loss.detach())

    return Contender(run, probe=lambda: _grads(who, given[:, :PROBE]), compiles=name == OURS)


# ---- processes of their own ------------------------------------------------------------------------------------------


def _fresh(subject: Subject, mode: str, length: int, figure: str, name: str) -> Contender:
    if name != OURS:
        want(name)
        if name not in whole.BUILDERS:
            raise Missing(f"{name}: has no first call of its own to compare")
    task = json.dumps(
        {**asdict(subject), "mode": mode, "length": length, "who": name, "threads": torch.get_num_threads()}
    )

    def run() -> float:
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-m", "statewise.benchmarks.fresh", task],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        return json.loads(done.stdout.splitlines()[-1])[figure]

    if name == OURS and figure in ("first", "total"):
        run()  # fills the kernel cache on the disk
    return Contender(run)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _sizes(model: Any) -> tuple[int, int]:
    """(parameters in matrix products of a layer stack, those of the head)."""
    head = model.embedding.weight.numel()
    return sum(p.numel() for p in model.parameters()) - head, head


def _exps(model: Any, positions: int) -> float:
    mixer = model.blocks[0].mixer
    if model.config["mixer"] != "mamba":
        return 0.0
    return float(positions * model.config["n_layer"] * mixer.d_inner * mixer.d_state)


def _needs(subject: Subject, mode: str, batch: int, length: int) -> dict[str, float]:
    model = _model(subject)
    body, head = _sizes(model)
    positions = batch * length
    if mode == DECODE:
        # Every weight is read once, every state read and written.
        mixer = model.blocks[0].mixer
        states = 8.0 * batch * model.config["n_layer"] * mixer.d_inner * mixer.d_state
        size = model.embedding.weight.element_size()
        return {"bytes": size * (body + head) + states, subject.dtype: 2.0 * batch * (body + head)}
    if mode == TRAIN:
        return {subject.dtype: 6.0 * positions * (body + head), "exp": 2 * _exps(model, positions)}
    return {subject.dtype: 2.0 * (positions * body + batch * head), "exp": _exps(model, positions)}


def _case(
    subject: Subject,
    mode: str,
    length: int,
    batch: int,
    build: Callable[[str], Contender],
    names: Sequence[str],
    **options: Any,
) -> Case:
    held = {}
    if mode in (PREFILL, TRAIN):
        config = subject.build(empty=True).config
        held = {name: whole.expected_memory(name, config, batch * length, mode == TRAIN) for name in names}
    return Case(
        suite="models",
        what=subject.name,
        mode=mode,
        dtype=subject.dtype,
        shape=f"{subject.n_layer} layers" if subject.n_layer else "",
        length=length,
        batch=batch,
        ours=partial(build, OURS),
        peers={name: partial(build, name) for name in names},
        memory=held,
        **options,
    )


def _python_peers(subject: Subject) -> list[str]:
    # mambapy has no half precision, and its Mamba-2 runs with mamba_ssm only.
    mambapy = (subject.name, subject.dtype) == ("mamba-130m", "float32")
    return ["transformers", "accelerated", *(["mambapy"] if mambapy else [])]


def prefill(subject: Subject, length: int) -> Case:
    """A prompt in one call: logits of its last token, and the state."""
    peers = [*_python_peers(subject), *(["llama.cpp"] if subject.device == "cpu" else [])]
    return _case(
        subject,
        PREFILL,
        length,
        1,
        partial(_prefill, subject, length),
        peers,
        check=lambda: _check(subject, _no_grad(lambda m: {"logits": whole.Ours(m).prefill(tokens(m, 1, length))})),
        needs=partial(_needs, subject, PREFILL, 1, length),
        tokens=length,
        smaller=partial(prefill, subject),
    )


def decode(subject: Subject, batch: int) -> Case:
    """One token for each row of a batch, from states in memory."""
    peers = [*_python_peers(subject), *(["llama.cpp"] if batch == 1 and subject.device == "cpu" else [])]

    def truth(model: Any) -> Tensors:
        return {"logits": whole.Ours(model).start(tokens(model, batch, PROMPT + 1))}

    return _case(
        subject,
        DECODE,
        1,
        batch,
        partial(_decode, subject, batch),
        peers,
        check=lambda: _check(subject, _no_grad(truth)),
        needs=partial(_needs, subject, DECODE, batch, 1),
        tokens=batch,
    )


def training(subject: Subject, length: int) -> Case:
    """Forward, loss and all gradients of one row. The optimiser is the same for everyone and left out."""
    peers = _python_peers(subject)
    return _case(
        subject,
        TRAIN,
        length,
        1,
        partial(_training, subject, length),
        peers,
        check=lambda: _check(subject, lambda m: _grads(whole.Ours(m), tokens(m, 1, length)[:, :PROBE])),
        needs=partial(_needs, subject, TRAIN, 1, length),
        tokens=length,
        smaller=partial(training, subject),
    )


def _told(subject: Subject, label: str, mode: str, length: int, figure: str, peers: Sequence[str]) -> Case:
    """A figure of a process of its own: bytes at its peak, or seconds."""
    return _case(
        subject,
        label,
        length,
        1,
        partial(_fresh, subject, mode, length, figure),
        peers,
        unit="bytes" if figure == "peak" else "s",
        repeat=1 if figure == "peak" else TELLS,
    )


def rows(device: str = "cpu", lengths: Sequence[int] | None = None, quick: bool = False) -> Iterator[Case]:
    """Prefill, decoding and training of both models, and what a fresh process costs."""
    small = {"n_layer": 2, "vocab_size": 1024} if quick else {}
    for name in MODELS:
        for dtype in ("float32", "bfloat16"):
            subject = Subject(name, dtype, device, **small)
            for length in lengths or ((64,) if quick else (1024,)):
                yield prefill(subject, length)
            for batch in (1, 8) if quick else BATCHES:
                yield decode(subject, batch)
        subject = Subject(name, "float32", device, **small)
        for length in lengths or ((64,) if quick else (1024,)):
            yield training(subject, length)
            if device == "cpu" and sys.platform != "win32":
                yield _told(subject, MEMORY[PREFILL], PREFILL, length, "peak", ["transformers"])
                # transformers' Mamba-1 loop would take half an hour for one step.
                others = ["transformers"] if name == "mamba2-130m" or quick else []
                yield _told(subject, MEMORY[TRAIN], TRAIN, length, "peak", others)
        yield _told(subject, FIRST, PREFILL, PROBE, "first", ["transformers"])
        yield _told(subject, START, PREFILL, PROBE, "total", ["transformers"])
