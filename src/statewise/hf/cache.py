"""The cache of `generate`: a state of ours, with the verbs that transformers asks of a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .. import state as trees
from ..segments import Segments
from ..state import State

# run(x, state, seg) -> (streams, state): streams are (B, L, ...) tensors, one output for each position of x.
Run = Callable[[Tensor, State, Segments | None], tuple[list[Tensor], State]]

# While the past is recorded, at most this many of a call's last positions have to be run again after a roll-back, ...
TAIL = 32
# ... and accepted positions that wait to be run again are run with the next ones, in one call, until they are so many.
WAITING = 16


@dataclass
class _Stretch:
    """Inputs of consecutive positions."""

    x: Tensor  # (B, L, ...)
    seg: Segments | None

    def __len__(self) -> int:
        return self.x.shape[1]

    def __getitem__(self, columns: slice) -> _Stretch:
        return _Stretch(self.x[:, columns], None if self.seg is None else self.seg[:, columns])

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> _Stretch:
        if self.seg is None:
            return _Stretch(fn(self.x), None)
        valid = None if self.seg.valid is None else fn(self.seg.valid)
        return _Stretch(fn(self.x), Segments(fn(self.seg.position), valid))

    def __add__(self, other: _Stretch) -> _Stretch:
        x = torch.cat([self.x, other.x], 1)
        if self.seg is None and other.seg is None:
            return _Stretch(x, None)
        # No Segments means: one stretch of a document that goes on.
        parts = [
            Segments.continuing(len(part.x), len(part), device=x.device) if part.seg is None else part.seg
            for part in (self, other)
        ]
        valid = [torch.ones_like(p.position, dtype=torch.bool) if p.valid is None else p.valid for p in parts]
        return _Stretch(x, Segments(torch.cat([p.position for p in parts], 1), torch.cat(valid, 1)))


class StatewiseCache(Cache):
    """The state of a model after `get_seq_length()` positions (padding included), batch-first in every leaf.

    Args:
        state: a state tree, as `model.init_state` and `extend` of our models give; None: before the first token.
        seen: positions behind it.

    A recurrent state cannot be cut back to an earlier position. After `activate_past_recording()` the cache keeps a
    state from before the last calls and their inputs, and `crop(-n)` takes the last n positions back exactly: the
    positions to keep are run again, with the next ones. `fork()` gives a copy that goes its own way.
    """

    def __init__(self, state: State = None, seen: int = 0):
        super().__init__(layers=[])
        self._state, self._seen = state, seen
        self.record_past = False
        self._kept: State = None  # the state before everything in _since
        self._since: list[_Stretch] = []  # inputs run since then
        self._waiting: _Stretch | None = None  # inputs to be run before any others: crop went back to _kept

    # ---- what the model calls ----------------------------------------------------------------------------------

    def advance(self, run: Run, x: Tensor, seg: Segments | None = None, *, tail: int = 0) -> list[Tensor]:
        """Run the model over new positions from this state and keep the state after them.

        Args:
            run: the model.
            x: (B, L, ...) inputs, L > 0.
            tail: at least so many of the last positions may be taken back later (if the past is recorded).
        """
        if not self.record_past:
            self._settle(run)
            streams, self._state = run(x, self._state, seg)
            self._seen += x.shape[1]
            return streams
        new = _Stretch(x, seg)
        if self._waiting is not None and len(self._waiting) >= WAITING:
            self._settle(run)
        parts = []
        tail = max(TAIL, tail)
        if self._waiting is None and len(new) > 2 * tail:
            # A long prompt is not run twice.
            streams, self._state = run(new[:-tail].x, self._state, new[:-tail].seg)
            parts.append(streams)
            self._forget()
            new = new[-tail:]
        if not self._since:
            self._kept = trees.clone(self._state)
        redo = 0 if self._waiting is None else len(self._waiting)
        chunk = new if self._waiting is None else self._waiting + new
        self._waiting = None
        streams, self._state = run(chunk.x, self._state, chunk.seg)
        self._since.append(chunk)
        self._seen += x.shape[1]
        parts.append([s[:, redo:] for s in streams])
        return [torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts)]

    def begin(self, state: State) -> None:
        """Begin from this state, if nothing was seen yet and no state was given."""
        if self._seen == 0 and self._state is None:
            self._state = state

    def _settle(self, run: Run) -> None:
        """Run what waits, so that the state is that of the last position."""
        if self._waiting is not None:
            _, self._state = run(self._waiting.x, self._state, self._waiting.seg)
            self._forget()

    def _forget(self) -> None:
        self._kept, self._since, self._waiting = None, [], None

    # ---- what users and `generate` call ------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The state tree. Raises RuntimeError while positions wait to be run again after `crop`."""
        if self._waiting is not None:
            raise RuntimeError(
                f"state: {len(self._waiting)} positions wait to be run again after crop; they are run with the next "
                "call of the model, or by model.settle(cache)"
            )
        return self._state

    def fork(self) -> StatewiseCache:
        """A copy with its own memory."""
        return self._map(torch.clone, StatewiseCache(seen=self._seen))

    def __deepcopy__(self, memo: dict) -> StatewiseCache:
        return self.fork()

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs. Costs one more state and the inputs since."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last positions back: 0 or a negative number. 0 accepts all so far and frees what was kept for it."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: want 0, or -n to take n positions back, got {tokens_to_remove}")
        if tokens_to_remove == 0:
            if self._waiting is None:
                self._forget()
            return
        if not self.record_past:
            raise RuntimeError(
                "crop: a recurrent state holds no earlier state; call activate_past_recording() before the positions "
                "that may be taken back, or fork() there and go on from the copy"
            )
        undo = self._since if self._waiting is None else [self._waiting]
        known = sum(map(len, undo))
        keep = known + tokens_to_remove
        if keep < 0:
            raise ValueError(
                f"tokens_to_remove: the inputs of the last {known} positions are kept, got {tokens_to_remove}"
            )
        whole = undo[0]
        for stretch in undo[1:]:
            whole = whole + stretch
        self._seen += tokens_to_remove
        if self._waiting is None:
            self._state = self._kept
        self._forget()
        if keep:
            self._waiting = whole[:keep]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._seen + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self._seen > 0

    def reset(self) -> None:
        """Back to before the first token."""
        self._state, self._seen = None, 0
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; repeats are allowed. A bool mask over rows will do as well."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        self._map(lambda t: t.index_select(0, indices.to(t.device)), self)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        self._map(lambda t: t.repeat_interleave(repeats, 0), self)

    def _map(self, fn: Callable[[Tensor], Tensor], into: StatewiseCache) -> StatewiseCache:
        """`fn` on every tensor that is held, written to `into`, which may be this cache."""
        into._state, into._kept = trees.map_state(fn, self._state), trees.map_state(fn, self._kept)
        into._since = [stretch.map_rows(fn) for stretch in self._since]
        into._waiting = None if self._waiting is None else self._waiting.map_rows(fn)
        into.record_past = self.record_past
        return into

    def __len__(self) -> int:
        # One stands for all layers: a state tree need not have one leaf a layer.
        return 1

    def __repr__(self) -> str:
        return f"StatewiseCache(seen={self._seen}, bytes={trees.nbytes(self._state)})"

    @property
    def batch_size(self) -> int:
        return -1 if self._state is None else trees.batch_size(self._state)

    @property
    def is_initialized(self) -> bool:
        return self._state is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return self.record_past

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        # "No" makes `generate` count positions, as this cache does.
        return [False]

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return self.record_past
