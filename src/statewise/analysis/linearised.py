"""A causal mixer along the path that one input makes: the linear system that small changes of the input obey.

`to_dsf` is for mixers that are linear in their values. A recurrence that bends its own state, such as an LSTM, has
no such form. It has this one, as has everything with a state of fixed size; for a linear RNN it is the RNN itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import state as states
from ..mixers.base import CausalMixer
from ..state import State

MAX_STATE = 2048  # numbers of a state whose matrix of derivatives is taken
MAX_NUMBERS = 1 << 27  # in the matrices of all positions together


@dataclass(frozen=True)
class Linearised:
    """dh_t = A_t dh_{t-1} + B_t dx_t and dy_t = C_t dh_{t-1} + D_t dx_t, exact to first order.

    The output is read off the state before, so that D_t is all that a token does to its own output.

    Args:
        A: (L, M, M), B: (L, M, D), C: (L, D, M), D: (L, D, D). M counts the real numbers of the state.
        y: (L, D), the outputs on the path itself.
        what: the mixer, for titles.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    y: Tensor
    what: str

    @property
    def eigenvalues(self) -> Tensor:
        """(L, M), complex: of A_t, how fast parts of the state are forgotten at each position."""
        return torch.linalg.eigvals(self.A)

    def run(self, dx: Tensor) -> Tensor:
        """The change of the outputs (L, D) for a small change of the inputs (L, D), one step after the other."""
        dh, dys = self.A.new_zeros(self.A.shape[1]), []
        for t in range(len(dx)):
            dys.append(self.C[t] @ dh + self.D[t] @ dx[t])
            dh = self.A[t] @ dh + self.B[t] @ dx[t]
        return torch.stack(dys)

    def matrix(self) -> Tensor:
        """(L, L, D, D): [t, s] is d y_t / d x_s, C_t A_{t-1} ... A_{s+1} B_s before t and D_t on the diagonal."""
        length, width = self.y.shape
        dense = self.y.new_zeros(length, length, width, width)
        paths = self.B.new_zeros(0, *self.B.shape[1:])  # (s, M, D): what is left in the state of each input so far
        for t in range(length):
            dense[t, :t] = self.C[t] @ paths
            dense[t, t] = self.D[t]
            paths = torch.cat([self.A[t] @ paths, self.B[t][None]])
        return dense


def linearise(mixer: CausalMixer, x: Tensor) -> Linearised:
    """The linear system that `mixer` is for small changes of `x`, by automatic differentiation of its step.

    Args:
        mixer: a causal mixer whose state has a fixed size. x: (1, L, D) with at least one token.

    Raises:
        TypeError: no causal mixer, or one whose state grows.
        ValueError: the shape of x, or a state too large.
    """
    if not isinstance(mixer, CausalMixer):
        raise TypeError(f"linearise: mixer: want a causal mixer, which has a state, got {type(mixer).__name__}")
    if x.ndim != 3 or x.shape[0] != 1 or 0 in x.shape:
        raise ValueError(f"linearise: x: want (1, L, D) with at least one token, got {tuple(x.shape)}")
    state = start(mixer, x, "linearise")
    numbers = len(flat(state))
    if x.shape[1] * numbers**2 > MAX_NUMBERS:
        raise ValueError(
            f"linearise: x: {x.shape[1]} matrices of {numbers} x {numbers} are too many to keep; want at most "
            f"{MAX_NUMBERS // numbers**2} tokens"
        )
    found: tuple[list[Tensor], ...] = ([], [], [], [], [])
    for t in range(x.shape[1]):
        system = derivatives(mixer, x[:, t], state)
        with torch.no_grad():
            y, state = mixer.extend(x[:, t : t + 1], state)
        for part, now in zip(found, (*system, y[0, 0])):
            part.append(now)
    A, B, C, D, y = map(torch.stack, found)
    return Linearised(A, B, C, D, y, type(mixer).__name__)


@torch.no_grad()
def start(mixer: CausalMixer, x: Tensor, who: str) -> State:
    """The first state, once it is known that it does not grow and is not too large."""
    first = mixer.init_state(1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    after = states.clone(first)
    for t in range(min(2, x.shape[1])):
        after = mixer.extend(x[:1, t : t + 1], after)[1]
    if [t.numel() for _, t in states.leaves(after)] != [t.numel() for _, t in states.leaves(first)]:
        raise TypeError(
            f"{who}: mixer: the state of {type(mixer).__name__} keeps its inputs as they are and only grows, so "
            "nothing in it decays; `analysis.memory` shows how far it looks back"
        )
    if len(flat(first)) > MAX_STATE:
        raise ValueError(
            f"{who}: mixer: {type(mixer).__name__} has {len(flat(first))} numbers of state; want at most {MAX_STATE} "
            "to take all of their derivatives"
        )
    return first


def flat(state: State) -> Tensor:
    """(M,): all real numbers of a state of one row, integers left out."""
    parts = [t for _, t in states.leaves(state) if t.is_floating_point() or t.is_complex()]
    return torch.cat([(torch.view_as_real(t) if t.is_complex() else t).flatten() for t in parts])


def _put(numbers: Tensor, like: State) -> State:
    """The inverse of `flat`."""
    sizes = [t.numel() * (2 if t.is_complex() else 1) for _, t in states.leaves(like) if not _whole_numbers(t)]
    pieces = iter(numbers.split(sizes))

    def put(t: Tensor) -> Tensor:
        if _whole_numbers(t):
            return t
        piece = next(pieces)
        return torch.view_as_complex(piece.reshape(*t.shape, 2)) if t.is_complex() else piece.reshape(t.shape)

    return states.map_state(put, like)


def _whole_numbers(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex())


@torch.enable_grad()
def state_derivative(mixer: CausalMixer, x_t: Tensor, state: State) -> Tensor:
    """(M, M): d (next state) / d state, for x_t (1, D)."""
    return torch.autograd.functional.jacobian(
        lambda numbers: flat(mixer.step(x_t, _put(numbers, state))[1]), flat(state).detach()
    )


@torch.enable_grad()
def derivatives(mixer: CausalMixer, x_t: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A (M, M), B (M, D), C (D, M) and D (D, D) of one step, for x_t (1, D)."""

    def move(numbers: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        y, new = mixer.step(x_t, _put(numbers, state))
        return flat(new), y[0]

    (A, B), (C, D) = torch.autograd.functional.jacobian(move, (flat(state).detach(), x_t.detach()))
    return A, B[:, 0], C, D[:, 0]
