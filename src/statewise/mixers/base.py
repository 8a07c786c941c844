"""The contract of a mixer. A capability is a type; a class is abstract or final; each method is written once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..segments import Segments
from ..state import State


class SequenceMixer(nn.Module, ABC):
    """Maps (B, L, D) to (B, L, D). With `seg`, documents do not see each other and padding gives zeros."""

    # Own parameters that belong to the dynamics (A, dt, D, ...): trained without weight decay, at their own rate.
    dynamics: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor: ...

    def fused(self) -> dict[str, dict[str, int]]:
        """Projections that hold several maps in one matrix: their names, and the rows of each part in order.

        So that a part can be looked at, or trained, alone: {"x_proj": {"dt": 48, "B": 16, "C": 16}}.
        """
        return {}


class Causal(nn.Module, ABC):
    """Anything that can be streamed: mixers, blocks and models of causal mixers offer the same verbs.

    A subclass writes `init_state` and `_run`; the verbs below are final.
    """

    @abstractmethod
    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> State:
        """The state before the first token, for `batch` rows, batch-first in every leaf.

        Args:
            capacity: number of tokens that a growing state (attention) must hold; None lets it grow. Mixers with
                a state of fixed size ignore it.
            device: where; the module's own device if None.
            dtype: of the recurrent state.
        """

    @abstractmethod
    def _run(self, x: Tensor, state: State, seg: Segments | None) -> tuple[Tensor, State]:
        """The only body: any length (0 included) from `state` (None means: as `init_state`)."""

    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        """The whole sequence at once. x: (B, L, ...) -> (B, L, ...)."""
        return self._whole(x, seg)

    def _whole(self, x: Tensor, seg: Segments | None) -> Tensor:
        """What `forward` gives. Written anew only where the state after the last token costs more than the outputs."""
        return self._run(x, None, seg)[0]

    def extend(self, x: Tensor, state: State, seg: Segments | None = None) -> tuple[Tensor, State]:
        """A chunk of any length that continues from `state`, which is consumed. Returns (y, new state)."""
        return self._run(x, state, seg)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """One position: x_t (B, ...) without the time axis. `state` is consumed."""
        y, state = self._run(x_t.unsqueeze(1), state, None)
        return y.squeeze(1), state

    def _device(self) -> torch.device:
        return next(self.parameters()).device


class CausalMixer(Causal, SequenceMixer):
    """A mixer that can be streamed."""

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """One position: x_t (B, D) without the time axis. `state` is consumed."""
        width = getattr(self, "d_model", None)
        if x_t.ndim != 2 or width not in (None, x_t.shape[1]):
            want = "(B, D)" if width is None else f"(B, D) with D = {width}"
            got = tuple(x_t.shape)
            raise ValueError(f"{type(self).__name__}.step: x_t: want {want} (extend takes (B, L, D)), got {got}")
        return super().step(x_t, state)


class Mixing(NamedTuple):
    """A mixer seen as a matrix: `emit(apply(dense, v)) == forward(x)`.

    Args:
        dense: kind "head": (B, H, L, L); kind "block": (B, L, L, P_out, P_in).
        v: values the matrix acts on. "head": (B, L, H, P); "block": (B, L, P_in).
        emit: what comes after the matrix (gate, norm, output projection): values to (B, L, D).
    """

    dense: Tensor
    v: Tensor
    emit: Callable[[Tensor], Tensor]
    kind: Literal["head", "block"] = "head"

    def apply(self) -> Tensor:
        """dense @ v."""
        dense = self.dense.to(self.v.dtype)
        if self.kind == "head":
            return torch.einsum("bhts,bshp->bthp", dense, self.v)
        return torch.einsum("btsij,bsj->bti", dense, self.v)


class HasMixing(ABC):
    """The mixer's core is linear in its values, so it has an exact matrix."""

    @abstractmethod
    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing: ...

    def matrix(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        """The dense matrix of `mixing`. Memory grows with L squared: for looking and testing."""
        return self.mixing(x, seg).dense


class HasRate(ABC):
    """The mixer's steps are amounts of time, so it can read an input that is sampled at another rate.

    `rate`, above 0, multiplies all of them: 2 for an input that is sampled half as often as in training. It may be set
    at any time. See `statewise.mixers.scale_rate` for whole models.
    """

    rate: float


class HasImpulse(HasMixing):
    """A linear time-invariant mixer: its matrix is Toeplitz and does not depend on the input."""

    @abstractmethod
    def impulse(self, length: int) -> Tensor:
        """The response to a unit impulse, (D, length), or (D_out, D_in, length) for a MIMO system."""


def check_input(mixer: nn.Module, x: Tensor, width: int) -> None:
    """Raise unless x is a floating (B, L, width)."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"{type(mixer).__name__}: x: want (B, L, D) with D = {width}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{type(mixer).__name__}: x: want a floating tensor, got {x.dtype}")
