"""The store: read a text once, go on from any stored beginning of it ever after."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import at_least
from .._reading import CHUNK, Context, Progress, as_tokens, check_vocabulary, read
from ._directory import Entry, StateDirectory
from ._file import NoState, StateError, key_of, load_context, pack, prefix_keys, read_header, write
from ._fingerprint import fingerprint


def _is_whole(path: Path) -> bool:
    """Whether a state lies there already; a damaged one is written again."""
    try:
        read_header(path)
    except StateError:
        return False
    return True


class StateStore(StateDirectory):
    """States of one model in a directory, which other models and processes may share.

        store = StateStore("states", model, budget=2 * 10**9)
        context = store.read(tokens)             # reads what no stored state covers, and stores the result
        generate(model, [context], 100)

    Args:
        path: the directory; made when something is stored.
        model: whose states these are. Its fingerprint is part of every key, so no other model's state is ever found.
        budget: bytes that the directory may take, of all models together; None: any number. When it is exceeded, what
            was not used for longest goes.
    """

    def __init__(self, path: str | os.PathLike, model: Any, *, budget: int | None = None) -> None:
        super().__init__(path)
        if budget is not None:
            at_least("budget", budget, 1)
        self.model, self.budget = model, budget

    def save(self, context: Context) -> Entry:
        """Store a context. A state that is there already is only marked as used.

        Raises:
            ValueError: the state alone exceeds the budget, or is not finite.
        """
        key = key_of(fingerprint(self.model), context.tokens.to(torch.int32))
        path = self.place(len(context.tokens), key)
        while True:
            if not _is_whole(path):
                self._write(context, path)
            with suppress(FileNotFoundError):  # another process has made room in between: once more
                os.utime(path)
                entry = self.entry(path)
                break
        if self.budget is not None:
            self.make_room(self.budget, keep=path)
        return entry

    def _write(self, context: Context, path: Path) -> None:
        header, tensors = pack(self.model, context)
        size = sum(t.nbytes for t in tensors.values())
        if self.budget is not None and size > self.budget:
            raise ValueError(f"budget: this state alone takes {size:,} bytes, got {self.budget:,} for all")
        write(header, tensors, path)

    def load(self, entry: Entry | str) -> Context:
        """The context of an entry, or of a key (its first digits will do).

        Raises:
            StateError: not there, of another model, or damaged.
        """
        entry = self.find(entry) if isinstance(entry, str) else entry
        self.header(entry)
        context = load_context(self.model, entry.path)
        self.touch(entry)
        return context

    def longest_prefix(self, tokens: Sequence[int] | Tensor) -> Context | None:
        """The longest stored beginning of these tokens, or None. `len(context.tokens)` says how many it covers.

        A damaged file is passed over with a warning.
        """
        text = as_tokens("tokens", tokens)
        entries = {(e.length, e.key): e for e in self.entries()}
        keys = prefix_keys(fingerprint(self.model), text, {length for length, _ in entries})
        for length in sorted(keys, reverse=True):
            entry = entries.get((length, keys[length]))
            if entry is None:
                continue
            try:
                return self.load(entry)
            except NoState:
                continue  # another process has made room in the meantime
            except StateError as error:
                warnings.warn(f"passed over: {error}", stacklevel=2)
        return None

    def read(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        every: int | None = None,
        chunk: int = CHUNK,
        progress: Progress | None = None,
    ) -> Context:
        """Read a text from the longest stored beginning on, and store the state at its end.

        Args:
            tokens: (n,), n >= 1, the whole text.
            every: also store the state after each multiple of so many tokens. A text that differs later on then starts
                from the last of them, and `trim` can go back to them.
            chunk, progress: see `statewise.inference.read`; progress counts what is left to read.
        """
        text = as_tokens("tokens", tokens)
        check_vocabulary(self.model, "tokens", text)
        if not len(text):
            raise ValueError("tokens: want at least one token, got none")
        if every is not None:
            at_least("every", every, 1)
        context = self.longest_prefix(text)
        start = 0 if context is None else len(context.tokens)
        for begin, end in _stretches(start, len(text), every):

            def report(done: int, _: int, before: int = begin - start) -> None:
                if progress is not None:
                    progress(before + done, len(text) - start)

            context = read(self.model, text[begin:end], context, chunk=chunk, progress=report)
            self.save(context)
        assert context is not None
        return context


def _stretches(start: int, end: int, every: int | None) -> list[tuple[int, int]]:
    """From start to end, cut at the multiples of `every`."""
    cuts = [] if every is None else [n for n in range(every, end, every) if n > start]
    bounds = [start, *cuts, end] if start < end else []
    return list(pairwise(bounds))
