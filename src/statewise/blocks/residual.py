"""Pre-norm residual wiring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..mixers.base import Causal, CausalMixer
from ..mixers.layers import RMSNorm
from ..mixers.one_step import OneStep, one_step
from ..segments import Segments
from ..state import State


class ResidualBlock(Causal):
    """x + scale * mixer(norm(x)), then x + scale * mlp(norm2(x)); one may be missing. Causal, with the mixer's state.

    The stream x may be kept in float32 (see `LanguageModel.residual_in_fp32`): the mixer sees it in the dtype of the
    norm's weight, and its output is added in the dtype of the stream.

    Source: Mamba (arXiv 2312.00752), section 3.4; equal to "Add, Norm, Mixer" there, counted from the other end. Scale:
    the residual multiplier of Granite (arXiv 2408.13359).
    """

    def __init__(
        self,
        d_model: int,
        mixer: CausalMixer | None,
        mlp: nn.Module | None = None,
        *,
        norm_eps: float = 1e-5,
        norm_offset: float = 0.0,
        scale: float = 1.0,
    ):
        super().__init__()
        if mixer is None and mlp is None:
            raise ValueError("ResidualBlock: mixer: want a mixer, a feed-forward part or both, got neither")
        self.scale = scale
        self.norm = None if mixer is None else RMSNorm(d_model, norm_eps, norm_offset)
        self.mixer = mixer
        self.norm2 = None if mlp is None else RMSNorm(d_model, norm_eps, norm_offset)
        self.mlp = mlp

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> State:
        if self.mixer is None:
            return ()
        return self.mixer.init_state(batch, capacity=capacity, device=device, dtype=dtype)

    def step_part(self) -> tuple[OneStep, nn.Module] | None:
        """Mixer and norm, where x + mixer(norm(x)) is all that the mixer does here and there is a kernel for a step."""
        if isinstance(self.mixer, OneStep) and self.norm is not None and self.scale == 1:
            return self.mixer, self.norm
        return None

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + (y if self.scale == 1 else y * self.scale).to(x.dtype)

    def _run(self, x: Tensor, state: State, seg: Segments | None) -> tuple[Tensor, State]:
        part = self.step_part()
        if part is not None and (one := one_step([part], x, [state], seg)) is not None:
            x, (state,) = one
        elif self.mixer is None or self.norm is None:
            state = ()
        else:
            y, state = self.mixer._run(self.norm(x.to(self.norm.weight.dtype)), state, seg)
            x = self._add(x, y)
        if self.mlp is not None and self.norm2 is not None:
            x = self._add(x, self.mlp(self.norm2(x.to(self.norm2.weight.dtype))))
        return x, state


def alike(blocks: Sequence[ResidualBlock]) -> list[tuple[OneStep, nn.Module | None]]:
    """Mixer and norm of the first few blocks, as far as they consist of a mixer of one kind that has a kernel for a
    step, and nothing else; see `mixers.one_step.one_step`."""
    parts: list[tuple[OneStep, nn.Module | None]] = []
    for block in blocks:
        part = None if block.mlp is not None else block.step_part()
        if part is None or (parts and type(part[0]) is not type(parts[0][0])):
            break
        parts.append(part)
    return parts
