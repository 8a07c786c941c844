"""S4-PTD and S5-PTD: S4D and S5 that start from HiPPO-LegS perturbed, then diagonalised, not from its normal part."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from .base import SequenceMixer
from .s4d import S4D
from .s5 import S5

_Class = TypeVar("_Class", bound=type[SequenceMixer])


def _perturbed(cls: _Class) -> _Class:
    """Class decorator: all options of the base class, with `gamma` and `seed` of PTD in the place of `init`."""
    base: Any = cls.__bases__[0]

    def __init__(self: Any, d_model: int, *, gamma: float = 1000.0, seed: int = 0, **options: Any) -> None:
        base.__init__(self, d_model, init={"name": "ptd", "gamma": gamma, "seed": seed}, **options)

    # One list of options, that of the base class: what reads signatures sees it, and an unknown option still raises.
    own = list(inspect.signature(__init__).parameters.values())[:-1]
    others = [
        p for p in inspect.signature(base.__init__).parameters.values() if p.name not in ("self", "d_model", "init")
    ]
    __init__.__signature__ = inspect.Signature(own + others)  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_perturbed
class S4PTD(S4D):
    """S4-PTD: an S4D that starts as HiPPO-LegS itself, up to a small perturbation, in every channel.

    A + E = V Lambda V^-1 is the exact decomposition of a matrix near LegS, found once (in 3 seconds for d_state = 64)
    and kept on disk; the transfer function has no spike, unlike that of S4D-LegS. Everything else is `S4D`.

    Args:
        gamma: price of the perturbation: about 1 / gamma is its size relative to LegS. See `maths.ptd`.
        seed: of the search for it.

    Source: Yu et al. 2023, "Robustifying State-space Models for Long Sequences via Approximate Diagonalization"
    (arXiv 2310.01698), section 4.
    """


@_perturbed
class S5PTD(S5):
    """S5-PTD: an S5 of which each block starts as HiPPO-LegS itself, up to a small perturbation.

    The eigenvectors V are not orthogonal: B is rotated with the inverse of V and C with V. B is random, as in S5;
    `b_init="hippo"` takes that of LegS, and then the states of a block are the memory that HiPPO defines. `clip_eigs`
    keeps training from leaving the half-plane in which it starts. Everything else is `S5`.

    Args:
        gamma: price of the perturbation: about 1 / gamma is its size relative to LegS. See `maths.ptd`.
        seed: of the search for it.

    Source: Yu et al. 2023, "Robustifying State-space Models for Long Sequences via Approximate Diagonalization"
    (arXiv 2310.01698), section 4.
    """
