"""Rows for single ops, in the shapes of mamba-130m and mamba2-130m (and of S4 for the convolutions)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..ops import OPS, OpSpec, diagonal_ssm, lti_conv
from .cases import Case, Check, Contender, Tensors, exact, gradients, moved, nearly
from .peers import OpPeer, Run, gpu, huggingface, mamba_py, plain, want

LENGTHS = (128, 1024, 8192)
FORWARD, BOTH, STEP = "forward", "forward+backward", "step"
# After this many positions with the decays drawn here, float64 itself has forgotten the state. So what a long row gives
# in its first and last WINDOW positions is the same in a row that has only twice as many.
WINDOW = 512

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """An op of the benchmark.

    Args:
        spec: the op; `spec.reference` gives the truth and what honest rounding costs.
        size: the sizes besides batch and length, as `cases.sample` wants them.
        variant: of the op's cases; `drop` names inputs to leave out.
        needs: (inputs, mode) -> amounts for `Bounds.least`.
        label: the shape without batch and length.
        forgets: the truth may look at windows.
    """

    spec: OpSpec
    size: Any
    variant: str
    label: str
    needs: Callable[[Inputs, str], Mapping[str, float]]
    peers: Mapping[str, OpPeer]
    drop: tuple[str, ...] = ()
    forgets: bool = True
    name: str = ""
    modes: tuple[str, ...] = (FORWARD, BOTH, STEP)
    half: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    batch: int = 1

    @property
    def title(self) -> str:
        return self.name or self.spec.name

    def inputs(self, batch: int, length: int, dtype: torch.dtype, device: str) -> Inputs:
        """The same for the same arguments, whatever was drawn before."""
        generator = torch.Generator().manual_seed(0)
        found = self.spec.load_cases().sample(
            self.variant, batch, length, dtype=dtype, decay="mixed", generator=generator, size=self.size
        )
        return moved({k: v for k, v in found.items() if k not in self.drop}, device)


# ---- the ops -------------------------------------------------------------------------------------------------------


def _times(forward: float, both: float, mode: str) -> float:
    return both if mode == BOTH else forward


def _scan_needs(inputs: Inputs, mode: str) -> dict[str, float]:
    # One exponential per state and position; the backward pass computes the states, so the exponentials, once more.
    states = inputs["x"].numel() * inputs["A"].shape[1]
    if mode == STEP:
        return {"exp": states, "bytes": 8 * states}
    return {"exp": _times(1, 2, mode) * states}


def _ssd_needs(inputs: Inputs, mode: str) -> dict[str, float]:
    if mode == STEP:
        return {"bytes": 8 * inputs["x"].numel() * inputs["B"].shape[-1]}
    # Each product has two in its gradient.
    kind = "bfloat16" if inputs["x"].dtype == torch.bfloat16 else "float32"
    return {kind: _times(1, 3, mode) * OPS["ssd"].load_cases().flops(inputs)}


def _linear_needs(inputs: Inputs, mode: str) -> dict[str, float]:
    if mode == STEP:
        return {"bytes": 4 * inputs["x"].numel() * inputs["x"].element_size()}
    # Forward reads a and x and writes h; backward reads a, h and dh and writes da and dx.
    return {"bytes": _times(1, 8 / 3, mode) * OPS["linear_scan"].load_cases().bytes_moved(inputs)}


def _conv_needs(inputs: Inputs, mode: str) -> dict[str, float]:
    if mode == STEP:
        return {"bytes": 2 * inputs["weight"].numel() * 4}
    # Forward reads x and writes y; backward reads x and dy and writes dx.
    return {"bytes": _times(1, 5 / 2, mode) * OPS["short_conv"].load_cases().bytes_moved(inputs)}


def _diagonal_needs(inputs: Inputs, mode: str) -> dict[str, float]:
    if mode == STEP:
        return {"bytes": 16 * inputs["u"].numel() * inputs["log_a"].shape[1]}
    return {"float32": _times(1, 3, mode) * OPS["diagonal_ssm"].load_cases().flops(inputs)}


def _fft_needs(inputs: Inputs, mode: str) -> dict[str, float]:
    u = inputs["u"]
    # Two real transforms of twice the length per row (four with gradients), and the product of the spectra.
    length = 2 * u.shape[1]
    transforms = u.numel() / u.shape[1] * (5 * length * math.log2(length) + 3 * length)
    return {"float32": _times(1, 2, mode) * transforms, "bytes": _times(2, 5, mode) * 4 * u.numel()}


class _FftCases:
    """`lti_conv` is no recurrence with a state, so it is no `OpSpec` of the library; here it is timed like one."""

    FACTOR = 4.0  # Fourier transforms of other lengths sum in another order

    @staticmethod
    def sample(variant: str, batch: int, length: int, *, dtype, decay, generator, size: int) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return {"u": normal(batch, length, size), "kernel": normal(size, length), "D": normal(size)}


class _FftSpec(OpSpec):
    def load_cases(self) -> Any:
        return _FftCases


def _lti_conv(u: Tensor, kernel: Tensor, D: Tensor) -> tuple[Tensor, None]:
    return lti_conv(u, kernel, D), None


def _fft_reference(**inputs: Any) -> tuple[Tensor, None]:
    return plain.fft_conv(inputs, FORWARD)()


def _fft_spec() -> OpSpec:
    return _FftSpec(
        name="lti_conv",
        run=_lti_conv,
        reference=_fft_reference,
        value="u",
        timed=("u",),
        reasons=lambda **_: {"reference": None},
        cases="",
    )


def catalogue() -> list[Op]:
    """All ops that are timed, with their peers."""
    step = (FORWARD, STEP)
    scan_peers = {
        "transformers": OpPeer("transformers", huggingface.selective_scan, step, held=(3, 8)),
        "mambapy": OpPeer("mambapy", mamba_py.selective_scan, held=(6, 12)),
        "mamba_ssm": OpPeer("mamba_ssm", gpu.selective_scan, step, device="cuda"),
    }
    ssd_peers = {
        "transformers": OpPeer("transformers", huggingface.ssd, step),
        "transformers, chunk 64": OpPeer("transformers", huggingface.ssd_64),
        "mamba_ssm": OpPeer("mamba_ssm", gpu.ssd, step, device="cuda"),
        "fla": OpPeer("fla", gpu.simple_gla, device="cuda"),
    }
    linear_peers = {
        "torch loop": OpPeer("torch", plain.scan_loop, step, held=(2, 6)),
        "mambapy": OpPeer("mambapy", mamba_py.linear_scan, held=(5, 9)),
    }
    conv_peers = {
        "torch Conv1d": OpPeer("torch", plain.short_conv, step),
        "causal_conv1d": OpPeer("causal_conv1d", gpu.short_conv, step, device="cuda"),
    }
    diagonal = replace(OPS["diagonal_ssm"], reference=partial(diagonal_ssm, algorithm="fft", backend="reference"))
    both = (FORWARD, BOTH)
    return [
        Op(OPS["selective_scan"], (1536, 16), "gated", "D1536 N16", _scan_needs, scan_peers),
        Op(OPS["ssd"], (24, 64, 128), "gated", "H24 P64 N128 G1", _ssd_needs, ssd_peers, drop=("z",), half=both),
        Op(OPS["short_conv"], 1792, "silu", "D1792 K4", _conv_needs, conv_peers),
        Op(OPS["linear_scan"], 1536, "plain", "D1536", _linear_needs, linear_peers),
        Op(
            OPS["linear_scan"],
            1536,
            "complex",
            "D1536",
            _linear_needs,
            linear_peers,
            name="linear_scan complex",
            modes=both,
        ),
        Op(
            diagonal,
            (256, 32),
            "conjugate",
            "D256 N32 complex",
            _diagonal_needs,
            {"torch.fft": OpPeer("torch", plain.s4d, step)},
            forgets=False,
        ),
        Op(
            _fft_spec(),
            256,
            "plain",
            "D256",
            _fft_needs,
            {"torch.fft": OpPeer("torch", plain.fft_conv)},
            forgets=False,
            name="fft_conv",
            modes=both,
            lengths=(4096,),
            batch=8,
        ),
    ]


# ---- rows ------------------------------------------------------------------------------------------------------------


def _direction(op: Op, batch: int, length: int, dtype: torch.dtype, device: str) -> Tensor:
    """What the output is multiplied by before it is summed up, so that gradients are those of no special case."""
    value = op.inputs(batch, length, dtype, device)[op.spec.value]
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(value)


def _named(y: Tensor, state: Any) -> Tensors:
    return {"y": y} if state is None else {"y": y, "state": state}


def _contender(
    run_op: Callable[[Inputs], Run], inputs: Inputs, mode: str, dy: Tensor | None, compiles: bool
) -> Contender:
    if mode != BOTH:
        made = run_op(inputs)

        def forward() -> Any:
            with torch.no_grad():
                return made()

        return Contender(forward, lambda out: _named(*out), compiles=compiles)
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor)}
    made = run_op({**inputs, **leaves})

    def both() -> Tensors:
        y, _ = made()
        return {"y": y.detach(), **gradients(y, leaves, dy)}  # type: ignore[arg-type]

    return Contender(both, lambda out: out, compiles=compiles)


def _windows(op: Op, length: int) -> list[tuple[slice, slice]]:
    """(positions to compute, those of them to compare) for the truth of a row; the first is the only one of a short."""
    if not op.forgets or length <= 2 * WINDOW:
        return [(slice(0, length), slice(0, length))]
    return [
        (slice(0, 2 * WINDOW), slice(0, WINDOW)),
        (slice(length - 2 * WINDOW, length), slice(length - WINDOW, length)),
    ]


def _truth(op: Op, inputs: Inputs, mode: str, dy: Tensor | None) -> Check:
    """Float64 and plain results, over windows at both ends of a long row.

    Gradients of what acts at all positions are sums over all of them, so windows say nothing of them.
    """
    timed, reference = op.spec.timed, op.spec.reference
    length = inputs[op.spec.value].shape[1]
    windows = _windows(op, length)
    whole = len(windows) == 1

    def run(given: Inputs, window: slice) -> Tensors:
        cut = {k: v[:, window] if k in timed and isinstance(v, Tensor) else v for k, v in given.items()}
        contender = _contender(
            lambda i: lambda: reference(**i), cut, mode, None if dy is None else dy[:, window], False
        )
        return contender.result(contender.run())  # type: ignore[misc]

    def gather(given: Inputs) -> Tensors:
        pieces: dict[str, list[Tensor]] = {}
        last: Tensors = {}
        for compute, compare in windows:
            inside = slice(compare.start - compute.start, compare.stop - compute.start)
            for name, t in run(given, compute).items():
                if name == "y" or name.removeprefix("grad ") in timed:
                    pieces.setdefault(name, []).append(t[:, inside])
                elif name == "state" or whole:
                    last[name] = t
        return {name: torch.cat(parts, 1) for name, parts in pieces.items()} | last

    truth = gather(exact(inputs))

    def cut(got: Tensors) -> Tensors:
        def one(name: str, t: Tensor) -> Tensor:
            if name == "y" or name.removeprefix("grad ") in timed:
                return torch.cat([t[:, compare] for _, compare in windows], 1)
            return t

        return {name: one(name, t) for name, t in got.items() if name in truth}

    return Check(truth, gather(inputs), gather(nearly(inputs)), op.spec.load_cases().FACTOR, cut)


def _step_inputs(op: Op, batch: int, dtype: torch.dtype, device: str) -> Inputs:
    """One position, and the state after four others."""
    inputs = op.inputs(batch, 5, dtype, device)
    timed = op.spec.timed
    before = {k: v[:, :4] if k in timed and isinstance(v, Tensor) else v for k, v in inputs.items()}
    now = {k: v[:, 4] if k in timed and isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        return {**now, "state": op.spec.reference(**before)[1]}


def _step_truth(op: Op, inputs: Inputs) -> Check:
    timed = op.spec.timed

    def run(given: Inputs) -> Tensors:
        y, state = op.spec.reference(**{k: v[:, None] if k in timed else v for k, v in given.items()})
        return {"y": y[:, 0], "state": state}

    with torch.no_grad():
        return Check(run(exact(inputs)), run(inputs), run(nearly(inputs)), op.spec.load_cases().FACTOR, _present)


def _present(got: Tensors) -> Tensors:
    return {k: v for k, v in got.items() if v is not None}


def row(op: Op, mode: str, length: int, *, dtype: str = "float32", device: str = "cpu", suite: str = "ops") -> Case:
    """One row of one op; its inputs are drawn when it is built."""
    kind, batch = getattr(torch, dtype), op.batch
    length = 1 if mode == STEP else length

    @lru_cache(maxsize=1)
    def inputs() -> Inputs:
        if mode == STEP:
            return _step_inputs(op, batch, kind, device)
        return op.inputs(batch, length, kind, device)

    @lru_cache(maxsize=1)
    def direction() -> Tensor | None:
        return _direction(op, batch, length, kind, device) if mode == BOTH else None

    def ours() -> Contender:
        if mode == STEP:
            function: Any = op.spec.step
            given = {**inputs(), "state": inputs()["state"].clone()}
            return _contender(lambda i: lambda: function(**i), given, mode, None, True)
        return _contender(lambda i: lambda: op.spec.run(**i), inputs(), mode, direction(), True)

    def theirs(peer: OpPeer) -> Contender:
        want(peer.package)
        adapter_mode = STEP if mode == STEP else FORWARD
        return _contender(lambda i: peer.adapter(i, adapter_mode), inputs(), mode, direction(), peer.compiles)

    def check() -> Check:
        return _step_truth(op, inputs()) if mode == STEP else _truth(op, inputs(), mode, direction())

    sample = op.inputs(batch, 1, kind, "cpu")
    held = 4.0 * sample[op.spec.value].numel() * length
    held *= sample["A"].shape[-1] if op.spec.name == "selective_scan" else 1
    peers = {name: peer for name, peer in op.peers.items() if peer.serves(mode, device)}
    return Case(
        suite=suite,
        what=op.title,
        mode=mode,
        dtype=dtype,
        shape=op.label,
        length=length,
        batch=batch,
        ours=ours,
        peers={name: partial(theirs, peer) for name, peer in peers.items()},
        check=check,
        needs=lambda: op.needs(inputs(), mode),
        memory={name: peer.held[mode == BOTH] * held for name, peer in peers.items()},
        tokens=batch * length,
        smaller=None if mode == STEP else lambda n: row(op, mode, n, dtype=dtype, device=device, suite=suite),
    )


def rows(device: str = "cpu", lengths: Sequence[int] | None = None, quick: bool = False) -> Iterator[Case]:
    """Every op forward, with its gradients and step by step."""
    for op in catalogue():
        for mode in op.modes:
            chosen: Sequence[int] = lengths or ((128,) if quick else op.lengths or LENGTHS)
            for length in (1,) if mode == STEP else chosen:
                yield row(op, mode, length, device=device)
                if mode in op.half:
                    yield row(op, mode, length, dtype="bfloat16", device=device)
