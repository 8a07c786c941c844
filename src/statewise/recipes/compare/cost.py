"""What a training step of a model computes, and the width at which a model has a given number of parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ...data.steps import Batch
from ...ops import OPS

_BUILDS = 24  # models built at most in the search for a width
_aten = torch.ops.aten


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- operations ----------------------------------------------------------------------------------------------------


def _fft(x: Tensor, dims: Any, real: bool, size: int | None = None) -> int:
    """The usual count for a fast transform: 5 n log2 n for complex numbers, half of it for real ones."""
    n = math.prod(x.shape[d] for d in dims) if size is None else size
    rows = x.numel() // max(math.prod(x.shape[d] for d in dims), 1)
    return int((2.5 if real else 5) * rows * n * math.log2(max(n, 2)))


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    dropout_causal = [r for r in rest if isinstance(r, bool)]
    # A causal mask leaves half of the products.
    return sdpa_flop_count(q.shape, k.shape, v.shape) // (2 if any(dropout_causal) else 1)


def _recurrent(x: Tensor, *weights: Tensor) -> int:
    """Of a layer such as an LSTM on x (..., D): a product with each of its matrices for each position."""
    return 2 * x.numel() // x.shape[-1] * sum(w.numel() for w in weights if w.ndim == 2)


_MORE: dict[Any, Callable[..., int]] = {
    _aten.mkldnn_rnn_layer: lambda x, a, b, *_: _recurrent(x, a, b),
    _aten.mkldnn_rnn_layer_backward: lambda x, a, b, *_: 2 * _recurrent(x, a, b),
    _aten._cudnn_rnn: lambda x, weights, *_: _recurrent(x, *weights),
    _aten._cudnn_rnn_backward: lambda x, weights, *_: 2 * _recurrent(x, *weights),
    _aten._fft_r2c: lambda x, dims, *_: _fft(x, dims, True),
    _aten._fft_c2r: lambda x, dims, norm, size: _fft(x, dims, True, size),
    _aten._fft_c2c: lambda x, dims, *_: _fft(x, dims, False),
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest: _attention(q, k, v, *rest),
    # Five products instead of two: the scores are computed again.
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, v, *rest: (
        _attention(q, k, v, *rest) * 5 // 2
    ),
}


def _long_conv(inputs: Any) -> int:
    """u (..., L, D): real transforms of twice the length, of the input, of the kernel, and back."""
    u, kernel = inputs["u"], inputs["kernel"]
    length = 2 * u.shape[-2]
    rows = 2 * u.numel() / u.shape[-2] + kernel.numel() / kernel.shape[-1]
    return int(2.5 * rows * length * math.log2(length)) + 6 * u.numel()


def _vandermonde(inputs: Any) -> int:
    """The real part of a product of (..., N) coefficients with powers, for each of `length` positions."""
    coeff = inputs["coeff"]
    return (4 if coeff.is_complex() else 2) * coeff.numel() * inputs["length"]


def _moments(inputs: Any) -> int:
    """Sums of (B, L, D) numbers times powers of N modes."""
    log_a = inputs["log_a"]
    return (4 if log_a.is_complex() else 2) * inputs["u"].numel() * log_a.shape[1]


def _cauchy(inputs: Any) -> int:
    """Four real products of (..., N) coefficients with quotients, for half of `length` frequencies."""
    return 8 * inputs["alpha"].numel() * (inputs["length"] // 2 + 1)


_KERNELS: dict[str, Callable[[Any], int]] = {
    "long_conv_numba": _long_conv,
    **dict.fromkeys(("vandermonde_numba", "vandermonde_triton"), _vandermonde),
    **dict.fromkeys(("moments_numba", "moments_triton"), _moments),
    **dict.fromkeys(("cauchy_numba", "cauchy_triton"), _cauchy),
    **dict.fromkeys(("rms_norm_numba", "rms_norm_triton"), lambda _: 0),  # elementwise
}


class FlopCounter(TorchDispatchMode):
    """Counts matrix products, convolutions, attention, Fourier transforms and the ops of this library.

    An op of ours counts by the formula that stands beside its cases, and its backward pass as twice that, whatever
    kernel serves. A multiply and an add are two. Elementwise work is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.uncounted: set[str] = set()  # ops of this library that have no formula
        self._forward: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.namespace == "statewise":
            self._ours(func, args)
        elif packet in _MORE:
            self.total += _MORE[packet](*args)
        elif packet in flop_registry:
            # A product of complex numbers is four real ones and two sums.
            complex_ = isinstance(out, Tensor) and out.is_complex()
            self.total += (4 if complex_ else 1) * flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def _ours(self, func: Any, args: Any) -> None:
        name = func._schema.name.split("::")[1]
        forward = name.removesuffix("_backward")
        if name != forward:
            before = self._forward.get(_op(forward), [0])
            self.total += 2 * sum(before) // len(before)
            return
        formula = _formula(forward)
        if formula is None:
            self.uncounted.add(forward)
            return
        inputs = dict(zip((a.name for a in func._schema.arguments), args))
        inputs.setdefault("activation", inputs.get("silu"))  # what the kernels of the short convolution call it
        count = formula(inputs)
        self._forward.setdefault(_op(forward), []).append(count)
        self.total += count


def _op(kernel: str) -> str:
    """The op that a kernel such as "ssd_numba" serves; the kernel's own name if none does."""
    return max((name for name in OPS if kernel.startswith(name)), key=len, default=kernel)


def _formula(kernel: str) -> Callable[[Any], int] | None:
    if kernel in _KERNELS:
        return _KERNELS[kernel]
    op = _op(kernel)
    return getattr(OPS[op].load_cases(), "flops", None) if op in OPS else None


def _first(batch: Batch, rows: int) -> Batch:
    tokens, targets, seg = batch
    inputs = slice(rows * (len(tokens) // len(targets)))  # a target may be that of several rows
    return Batch(tokens[inputs], targets[:rows], None if seg is None else seg[inputs])


def step_flops(recipe: Any) -> tuple[int, list[str]]:
    """(operations of a training step, ops that are not among them).

    The step is run with one row and with two. What does not depend on the number of rows (a kernel made from
    parameters) is thereby told from what does, and no memory for a whole batch is needed.
    """
    batch, uncounted, counts = recipe.data.batch(0), Counter[str](), []
    task = recipe.task.train()
    for rows in (1, 2)[: recipe.training.batch_size]:
        with FlopCounter() as counter:
            task.measure(_first(batch, rows))[0]["loss"].backward()
        task.zero_grad(set_to_none=True)
        counts.append(counter.total)
        uncounted.update(counter.uncounted)
    slope = counts[-1] - counts[0]
    return counts[0] + (recipe.training.batch_size - 1) * slope, sorted(uncounted)


# ---- width ---------------------------------------------------------------------------------------------------------


def match_width(count: Callable[[int], int], start: int, target: int) -> tuple[int, int]:
    """The width whose count is nearest to `target` among those tried: multiples of 8, or finer if widths are small.

    Args:
        count: parameters of the model of a width; raises ValueError or TypeError for widths that it does not take.
        start: a width that it takes.

    Returns:
        (width, its count). `start` itself where that is nearest.

    Raises:
        ValueError: what `count(start)` raises.
    """
    known, grain = {start: count(start)}, min(max(start // 16, 1), 8)
    refused: set[int] = set()
    while len(known) + len(refused) < _BUILDS:
        best = min(known, key=lambda w: abs(known[w] - target))
        # Parameters grow between linearly and quadratically with the width; from the nearest known, quadratically.
        guess = max(grain, round(best * math.sqrt(target / known[best]) / grain) * grain)
        step = grain if known[best] < target else -grain
        guess = guess if guess != best else best + step
        while guess in refused or (guess in known and guess != best):
            guess += step
        if guess == best or guess < grain or _between(known, guess, best, target):
            break
        try:
            known[guess] = count(guess)
        except (ValueError, TypeError):
            refused.add(guess)  # a width that heads or groups do not divide
    width = min(known, key=lambda w: abs(known[w] - target))
    return width, known[width]


def _between(known: dict[int, int], guess: int, best: int, target: int) -> bool:
    """True if a width on the other side of the target was tried already that is no further than `guess`."""
    side = known[best] < target
    others = [w for w in known if (known[w] < target) != side]
    return bool(others) and (min(others) <= guess if guess > best else max(others) >= guess)
