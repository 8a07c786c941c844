"""LSTM: the classical gated recurrence, a baseline that state space models are measured against."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .._tracing import transformed
from ..ops._precision import no_autocast
from ..segments import INVALID, RESET, Segments
from ..state import exportable
from .base import CausalMixer, check_input


@exportable
class LSTMState(NamedTuple):
    h: Tensor  # (B, D): last output
    c: Tensor  # (B, D): cell


class LSTM(CausalMixer):
    """LSTM of width D: nonlinear in its state, so it has no matrix and runs one position after the other.

    Args:
        d_model: width D of input, output and state.

    The computation, the names of the weights and their initialisation are those of `torch.nn.LSTM`. With `seg`, each
    document runs as a row of its own.

    Source: Hochreiter and Schmidhuber 1997; with forget gates, Gers et al. 2000.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model
        # Not an nn.LSTM, which torch.compile refuses.
        bound = 1 / math.sqrt(d_model)
        for name, shape in (
            ("weight_ih_l0", (4 * d_model, d_model)),
            ("weight_hh_l0", (4 * d_model, d_model)),
            ("bias_ih_l0", (4 * d_model,)),
            ("bias_hh_l0", (4 * d_model,)),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> LSTMState:
        device = self._device() if device is None else device
        h, c = torch.zeros(2, batch, self.d_model, device=device, dtype=dtype)
        return LSTMState(h, c)

    def _run(self, x: Tensor, state: LSTMState | None, seg: Segments | None) -> tuple[Tensor, LSTMState]:
        check_input(self, x, self.d_model)
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        if x.shape[1] == 0:
            return x, state
        weights: list[Tensor] = list(self.parameters())
        dtype = weights[0].dtype
        start = LSTMState(*(t.to(dtype) for t in state))
        with no_autocast(x):
            if transformed():
                y, ends = self._by_cells(x.to(dtype), start, seg, weights)
            elif seg is None:
                y, *ends = torch.lstm(
                    x.to(dtype), [t[None] for t in start], weights, True, 1, 0.0, self.training, False, True
                )
                ends = [t[0] for t in ends]
            else:
                y, ends = self._documents(x.to(dtype), start, seg, weights)
        return y.to(x.dtype), LSTMState(*(end.to(t.dtype) for end, t in zip(ends, state)))

    def _by_cells(
        self, x: Tensor, state: LSTMState, seg: Segments | None, weights: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Position by position, in sums and products: transforms of torch.func do not go through torch.lstm."""
        into, back, *biases = weights
        gates = torch.nn.functional.linear(x, into, biases[0] + biases[1])
        marks = None if seg is None else seg.marks[..., None]
        (h, c), ys = state, []
        for t in range(x.shape[1]):
            if marks is not None:
                h, c = (end.masked_fill(marks[:, t] == RESET, 0) for end in (h, c))
            enter, forget, value, show = (gates[:, t] + h @ back.mT).chunk(4, -1)
            cell = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(value)
            out = torch.sigmoid(show) * torch.tanh(cell)
            if marks is not None:
                out, cell = (torch.where(marks[:, t] == INVALID, a, b) for a, b in ((h, out), (c, cell)))
            h, c = out, cell
            ys.append(h)
        y = torch.stack(ys, 1)
        return (y if seg is None else seg.mask(y)), [h, c]

    def _documents(
        self, x: Tensor, state: LSTMState, seg: Segments, weights: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Gather each document, and the piece of one that continues, into a row; put outputs and last states back."""
        B, L, D = x.shape
        valid = torch.ones_like(seg.resets) if seg.valid is None else seg.valid
        row, column = valid.nonzero(as_tuple=True)
        y = x.new_zeros(B, L, D)
        if len(row) == 0:
            return y, list(state)
        name = row * (L + 1) + seg.document[row, column]
        names, group, count = name.unique_consecutive(return_inverse=True, return_counts=True)
        rank = torch.arange(len(row), device=x.device) - (count.cumsum(0) - count)[group]
        table = x.new_zeros(len(names), int(count.max()), D).index_put((group, rank), x[row, column])
        # Document 0 of a row is what was under way when the row began.
        home, fresh = names // (L + 1), (names % (L + 1) > 0)[:, None]
        start = [t[home].masked_fill(fresh, 0) for t in state]
        packed = pack_padded_sequence(table, count.cpu(), batch_first=True, enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        start = [t[order][None] for t in start]
        flat, *ends = torch.lstm(packed.data, packed.batch_sizes, start, weights, True, 1, 0.0, self.training, False)
        out, _ = pad_packed_sequence(packed._replace(data=flat), batch_first=True)
        y = y.index_put((row, column), out[group, rank])
        # Of several documents in a row the last one's state goes on.
        last = torch.ones_like(home, dtype=torch.bool)
        last[:-1] = home[1:] != home[:-1]
        return y, [t.index_put((home[last],), end[0][back][last]) for t, end in zip(state, ends)]
