"""Checks that every op makes on its arguments. Each error names the argument, what was got and what would do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..segments import Segments

_COMPUTE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
# Tables instead of dtype.to_real() and dtype.to_complex(), which torch.compile cannot trace.
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_COMPLEX = {real: number for number, real in _REAL.items()}


def compute_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which recurrences run: float32 for half precision, otherwise the tensor's own."""
    return _COMPUTE.get(t.dtype, t.dtype)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the real part."""
    return _REAL.get(dtype, dtype)


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype whose parts have this dtype (float32 or float64)."""
    return _COMPLEX.get(dtype, dtype)


def shape(op: str, name: str, t: Tensor, want: Sequence[int | str], sizes: dict[str, int]) -> None:
    """Check `t` against a shape such as ("B", "L", "D"); known letters must agree, new ones go into `sizes`."""
    # Written for speed: a decoding step makes dozens of these checks.
    got = t.shape
    new = []
    ok = len(got) == len(want)
    if ok:
        for s, n in zip(want, got):
            e = sizes.get(s) if s.__class__ is str else s
            if e is None:
                new.append((s, n))
            elif isinstance(e, int) and e != n:
                ok = False
                break
    if not ok:
        letters = ", ".join(str(s) for s in want)
        numbers = ", ".join(str(sizes.get(s, s) if isinstance(s, str) else s) for s in want)
        wanted = f"({letters})" if letters == numbers else f"({letters}) = ({numbers})"
        raise ValueError(f"{op}: {name}: want shape {wanted}, got {tuple(got)}")
    for s, n in new:
        sizes.setdefault(s, n)  # type: ignore[arg-type]


def same_kind(op: str, first: tuple[str, Tensor], **others: Tensor | None) -> None:
    """All tensors on one device, and in the dtype of the first or in the dtype it computes in (float32 parameters
    beside bfloat16 activations are meant; float32 beside float64 is a mistake)."""
    lead_name, lead = first
    if not (lead.is_floating_point() or lead.is_complex()):
        raise TypeError(f"{op}: {lead_name}: want a floating tensor, got {lead.dtype}")
    real = real_dtype(compute_dtype(lead))
    allowed = {lead.dtype, real, complex_dtype(real)}
    for name, t in others.items():
        if t is None:
            continue
        if t.device != lead.device:
            raise ValueError(f"{op}: {name} is on {t.device} but {lead_name} on {lead.device}; move one of them")
        if t.dtype not in allowed:
            raise TypeError(
                f"{op}: {name} is {t.dtype} but {lead_name} is {lead.dtype}; want {name} in "
                f"{' or '.join(sorted(str(d) for d in {lead.dtype, compute_dtype(lead)}))}"
            )


def known(condition: bool) -> bool:
    """`condition` on sizes; False where it is open in a program that is being made for many sizes, and so not a reason
    for that program to be made for some of them only."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return condition


def undecided(size: int, least: int) -> bool:
    """Whether it is open if size >= least, in a program that is being made for many sizes."""
    return torch.compiler.is_compiling() and not known(size >= least) and not known(size < least)


def segments(op: str, seg: Segments | None, batch: int, length: int, device: torch.device) -> None:
    if seg is None:
        return
    if not isinstance(seg, Segments):
        raise TypeError(f"{op}: seg: want a statewise.Segments or None, got {type(seg).__name__}")
    seg.check(batch, length, device)
