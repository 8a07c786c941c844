"""`statewise.deterministic`: the same bits for a token however it is computed.

Libraries choose kernels, and with them the order of additions, by the shape of their arguments; vector kernels treat
the last few numbers of an array by other code than the rest; threads split arrays anywhere. So a token's numbers depend
on the length of the call, on the rest of the batch and on the number of threads. Inside `deterministic()` a
TorchDispatchMode sees every operator that PyTorch runs on this thread, the backward pass included, and

- runs what is exact for each number alone (sums of two numbers, copies, comparisons, indices) as it is,
- runs other elementwise operators on pieces of one fixed size, where every number is treated by the same code,
- runs matrix products and sums in kernels with a fixed order,
- takes composite operators apart,
- and refuses everything else.

Ops of this library ask `active()` and take their sequential kernels, one token being a sequence of length 1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# Numbers of one call of an elementwise kernel. Below the size from which PyTorch splits an array over threads, and a
# multiple of everything that vector loops take at once, so that no number is left to the code for remainders.
_PIECE, _WHOLE = 8192, 256

_on = 0  # a plain number: a compiled program checks that it is still what it was
_local = threading.local()


class NotDeterministic(RuntimeError):
    """Inside `statewise.deterministic()`: this operator has no form with a fixed order of additions."""


def active() -> bool:
    """Whether this thread is inside `statewise.deterministic()`."""
    if _on == 0 or torch.compiler.is_compiling():
        return False
    return getattr(_local, "mode", None) is not None


def token_apart() -> bool:
    """Whether an op may take one token another way than a sequence: without gradients, and bits may differ."""
    return not torch.is_grad_enabled() and not active()


class deterministic:
    """Inside, a token has the same bits however it is computed. A context manager and a switch for this thread.

        with statewise.deterministic():
            ...
        statewise.deterministic()       # from here on
        statewise.deterministic(False)  # until here

    On CPU, in float32 and half precision (added up in float32), for language models of all mixers:

    - the whole sequence at once, `extend` in any chunks and `step` by `step` give identical bits;
    - so does a row in any batch, at any place in it, and with any padding;
    - the backward pass, if it runs inside too, gives identical bits from run to run;
    - all of it for any number of threads.

    Between two kinds of processor bits may differ. An operator for which this cannot be had, or that is not known,
    raises NotDeterministic or BackendError and says why; so does everything on a GPU and in float64.
    """

    def __init__(self, enabled: bool = True):
        self._before = getattr(_local, "mode", None) is not None
        _switch(enabled)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        _switch(self._before)


def _switch(enabled: bool) -> None:
    global _on
    mode = getattr(_local, "mode", None)
    if enabled and mode is None:
        _local.mode = _FixedOrder()
        _local.mode.__enter__()
        _on += 1
    elif not enabled and mode is not None:
        mode.__exit__(None, None, None)
        _local.mode = None
        _on -= 1


# ---- what is exact as it is ------------------------------------------------------------------------------------------

# Elementwise, correctly rounded number by number in any kernel (for real numbers).
_ROUNDED = frozenset(
    """abs add bitwise_and bitwise_not bitwise_or bitwise_xor ceil clamp clamp_max clamp_min copy div eq fill floor
    ge gt isfinite isinf isnan le logical_and logical_not logical_or logical_xor lt masked_fill maximum
    minimum mul ne neg nextafter reciprocal relu round sgn sign signbit sqrt sub threshold trunc where
    zero""".split()  # noqa: SIM905
)
# Of complex numbers these are exact too.
_EXACT_COMPLEX = frozenset("add sub neg copy fill zero where masked_fill eq ne conj_physical".split())  # noqa: SIM905
# Moves numbers, counts them, compares them, or adds them up one after the other in the order of an index.
_MOVES = frozenset(
    """_conj _local_scalar_dense _neg_view _reshape_alias _reshape_copy _to_copy _unsafe_view alias amax amin any all
    argmax argmin argsort as_strided bernoulli cat clone complex constant_pad_nd cummax cummin cumsum detach
    diag_embed diagonal embedding embedding_dense_backward empty_like equal expand flip full_like gather index
    index_add index_copy index_fill index_select is_same_size lift_fresh masked_scatter masked_select max min
    multinomial narrow_copy native_dropout new_empty new_empty_strided new_full new_ones new_zeros nonzero normal
    ones_like permute rand_like randn_like repeat repeat_interleave resolve_conj resolve_neg roll scalar_tensor
    scatter scatter_add select select_backward select_scatter set slice slice_backward slice_scatter sort split
    split_with_sizes squeeze stack t topk transpose tril triu unbind unfold uniform unsqueeze view view_as_complex
    view_as_real zeros_like real imag value_selecting_reduction_backward _pin_memory""".split()  # noqa: SIM905
)


def _name(func: Any) -> str:
    return func._opname.rstrip("_") or func._opname


def _exact(func: Any, tensors: list[Tensor], args: tuple, kwargs: dict) -> bool:
    name = _name(func)
    if name in _MOVES or func.is_view:
        return True
    if any(t.is_complex() for t in tensors):
        return name in _EXACT_COMPLEX and kwargs.get("alpha", 1) == 1
    if name == "pow":
        return isinstance(args[1], (int, float)) and args[1] == 2  # x * x
    return name in _ROUNDED and kwargs.get("alpha", 1) == 1 and kwargs.get("rounding_mode") is None


# ---- elementwise -----------------------------------------------------------------------------------------------------


def _elementwise(func: Any, args: tuple, kwargs: dict) -> Tensor:
    """An elementwise operator on pieces of fixed sizes, so that a number's place does not matter."""
    if func._schema.is_mutable:
        if "out" in kwargs:
            raise NotDeterministic(f"{func}: out= is not supported inside statewise.deterministic()")
        plain = getattr(getattr(aten, func._opname[:-1]), func._overloadname)
        return args[0].copy_(_elementwise(plain, args, kwargs))
    spread = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim > 0]
    shape = torch.broadcast_shapes(*(t.shape for t in spread))
    count = prod(shape)
    if not spread or count == 0:
        return func(*args, **kwargs)
    room = -(-count // _WHOLE) * _WHOLE
    lines: dict[int, Tensor] = {}
    for t in spread:
        line = t.expand(shape).reshape(-1)
        lines[id(t)] = line if room == count else torch.cat([line, line[-1:].expand(room - count)])

    def piece(lo: int) -> Tensor:
        cut = lambda x: lines[id(x)][lo : lo + _PIECE] if isinstance(x, Tensor) and x.ndim > 0 else x  # noqa: E731
        return func(*tree_map(cut, args), **tree_map(cut, kwargs))

    pieces = [piece(lo) for lo in range(0, room, _PIECE)]
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return whole[:count].reshape(shape)


# ---- products and sums -----------------------------------------------------------------------------------------------


def _check(what: Any, *tensors: Tensor) -> None:
    for t in tensors:
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise NotDeterministic(
                f"{what}: inside statewise.deterministic() products and sums are made in float32, got {t.dtype}"
            )


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    from ._fixed import product

    _check("matrix product", a, b)
    return product(a, b).to(torch.promote_types(a.dtype, b.dtype))


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _bmm(a[None], b[None])[0]


def _affine(c: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any) -> Tensor:
    """beta c + alpha (a @ b), rounded once to the dtype of a; c may be one row."""
    from ._fixed import product

    _check("matrix product", a, b, c)
    y = product(a, b) if a.ndim == 3 else product(a[None], b[None])[0]
    y = y if alpha == 1 else y * alpha
    if beta != 0:
        y = y + (c.float() if beta == 1 else c.float() * beta)
    return y.to(a.dtype)


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _affine(c, a, b, beta, alpha)


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    from ._fixed import sums

    if x.is_complex():
        parts = _sum(torch.view_as_real(x), [d % x.ndim for d in _dims(x, dim)], keepdim)
        return torch.view_as_complex(parts)
    if not x.is_floating_point():
        return torch.sum(x, _dims(x, dim), keepdim, dtype=dtype)
    dims = sorted({d % x.ndim for d in _dims(x, dim)}) if x.ndim else []
    kept = [d for d in range(x.ndim) if d not in dims]
    lines = x.permute(*kept, *dims).reshape(prod(x.shape[d] for d in kept), -1 if x.numel() else 0)
    y = sums(lines if lines.dtype == torch.float64 else lines.float()).reshape([x.shape[d] for d in kept])
    if keepdim:
        y = y.reshape([1 if d in dims else n for d, n in enumerate(x.shape)])
    return y.to(dtype or x.dtype)


def _dims(x: Tensor, dim: Any) -> list[int]:
    return list(range(x.ndim)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    count = prod(x.shape[d] for d in _dims(x, dim))
    wide = _sum(x if x.is_complex() or x.dtype == torch.float64 else x.float(), dim, keepdim)
    return (wide / count).to(dtype or x.dtype)


def _in_turn(func: Any) -> Callable:
    """The operator in PyTorch's own deterministic mode, where values that meet at an index are added in turn."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        before = torch.are_deterministic_algorithms_enabled()
        warn = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return func(*args, **kwargs)
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn)

    return run


_KERNELS: dict[Any, Callable] = {
    **{f: _in_turn(f) for f in (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)},
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.mv.default: lambda a, b: _mm(a, b[:, None])[:, 0],
    aten.dot.default: lambda a, b: _sum(a * b),
    aten.sum.default: lambda x, *, dtype=None: _sum(x, dtype=dtype),
    aten.sum.dim_IntList: _sum,
    aten.mean.default: lambda x, *, dtype=None: _mean(x, dtype=dtype),
    aten.mean.dim: _mean,
}


# Operators on lists of tensors that are taken one tensor after the other (clipping of gradients uses some).
_LISTS = {f"_foreach_{name}": name for name in ("abs", "add", "copy", "div", "mul", "neg", "sqrt", "sub", "zero")}
_LISTS["_foreach_norm"] = "linalg_vector_norm"


def _one_by_one(func: Any, args: tuple, kwargs: dict) -> list[Tensor] | None:
    in_place = func._opname.endswith("_")
    single = getattr(aten, _LISTS[_name(func)] + ("_" if in_place else ""))
    done = [single(*(a[i] if isinstance(a, (list, tuple)) else a for a in args), **kwargs) for i in range(len(args[0]))]
    return None if in_place else done


class _FixedOrder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for t in tensors:
            if t.device.type != "cpu":
                raise NotDeterministic(
                    f"{func}: inside statewise.deterministic() everything runs on CPU, got a tensor on {t.device}; "
                    "kernels with a fixed order are there for CPU only"
                )
        if func.namespace == "statewise" or not any(t.is_floating_point() or t.is_complex() for t in tensors):
            return func(*args, **kwargs)
        kernel = _KERNELS.get(func)
        if kernel is not None:
            return kernel(*args, **kwargs)
        if _exact(func, tensors, args, kwargs):
            return func(*args, **kwargs)
        if torch.Tag.pointwise in func.tags:
            return _elementwise(func, args, kwargs)
        if _name(func) in _LISTS:
            with self:
                return _one_by_one(func, args, kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        decomposition = _decompositions().get(func)
        if decomposition is None:
            raise NotDeterministic(
                f"{func}: no form with a fixed order of additions is known, so its bits could depend on the shape of "
                "the call, on other rows or on the number of threads; leave statewise.deterministic() for it"
            )
        with self:
            return decomposition(*args, **kwargs)


def _decompositions() -> dict[Any, Callable]:
    from torch._decomp import decomposition_table

    return decomposition_table
