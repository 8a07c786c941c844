"""Text instead of tokens: a tokenizer's view of a generation, stop strings included."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ._generation import Generation, Until, generate
from ._reading import Context

_HALF = "\ufffd"  # what stands for bytes that are no whole character (yet)


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Bytes:
    """UTF-8: one token per byte, for models of 256 tokens."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class Vocabulary:
    """The tokenizer of a `tokenizer.json`, through the `tokenizers` library (the file is data; nothing is run)."""

    def __init__(self, file: str | os.PathLike) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ValueError(f"{file}: wants the tokenizers library: pip install statewise[hf]") from error
        try:
            self._library = Library.from_file(os.fspath(file))
        except Exception as error:  # the library raises nothing more exact
            raise ValueError(f"{file}: is not a tokenizer file: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._library.decode(list(tokens), skip_special_tokens=True)


def tokenizer_for(model: Any, path: str | os.PathLike) -> Tokenizer:
    """The tokenizer that lies beside a model's weights, or bytes for a model of 256 tokens.

    Raises:
        ValueError: neither; the message says what is missing.
    """
    file = Path(path) / "tokenizer.json"
    if file.is_file():
        return Vocabulary(file)
    size = getattr(model, "vocab_size", None)
    if size == 256:
        return Bytes()
    raise ValueError(f"{path}: want a byte model (256 tokens), or a tokenizer.json beside it; got {size} tokens")


class _Decoder:
    """Tokens one by one to text, for any tokenizer: a character is given out when all of its bytes are there.

    A token's text may depend on the token before it (spaces), so a few earlier tokens are decoded along.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._tokens: list[int] = []
        self._start = self._end = 0  # tokens before `start` are forgotten; the text of those before `end` is out

    def push(self, token: int) -> str:
        self._tokens.append(token)
        before, now = self._decode(self._tokens[self._start : self._end]), self._decode(self._tokens[self._start :])
        # A character of UTF-8 has at most four bytes: what is not whole after four more tokens never will be.
        if now.endswith(_HALF) and len(self._tokens) - self._end < 4:
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return now[len(before) :]

    def finish(self) -> str:
        before = self._decode(self._tokens[self._start : self._end])
        return self._decode(self._tokens[self._start :])[len(before) :]


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class Piece(NamedTuple):
    """Some new text of one row."""

    row: int
    text: str


class TextGeneration(Iterator[Piece]):
    """What `generate_text` returns: an iterator over pieces of text as they are made, of all rows in turn.

    Attributes:
        texts: what each row has made so far; whole when the iteration has ended.
        stopped: for each row the stop string it ended with, or None.
        tokens: the `Generation` below: log-probabilities, contexts, counts.
    """

    def __init__(
        self, tokenizer: Tokenizer, start: Callable[[Until], Generation], rows: int, stop: Sequence[str]
    ) -> None:
        self.texts = [""] * rows
        self.stopped: list[str | None] = [None] * rows
        self._stop, self._longest = tuple(stop), max(map(len, stop), default=0)
        simple = isinstance(tokenizer, Bytes)
        self._decoders = [_ByteDecoder() if simple else _Decoder(tokenizer) for _ in range(rows)]
        self._ready: list[Piece] = []
        self.tokens = start(self._take)

    def _take(self, row: int, made: list[int]) -> bool:
        """The text of one more token; whether a stop string is in it now."""
        return self._add(row, self._decoders[row].push(made[-1]))

    def _add(self, row: int, piece: str) -> bool:
        # Only what is new can complete a stop string.
        start = max(0, len(self.texts[row]) - self._longest + 1)
        recent = self.texts[row][start:] + piece
        ends = [(recent.find(stop) + len(stop), stop) for stop in self._stop if stop in recent]
        if ends:
            end, self.stopped[row] = min(ends)
            piece = recent[len(self.texts[row]) - start : end]
        self.texts[row] += piece
        if piece:
            self._ready.append(Piece(row, piece))
        return bool(ends)

    def __next__(self) -> Piece:
        while not self._ready:
            if next(self.tokens, None) is None:
                self._finish()
                if not self._ready:
                    raise StopIteration
        return self._ready.pop(0)

    def _finish(self) -> None:
        for row, decoder in enumerate(self._decoders):
            if self.stopped[row] is None:
                self._add(row, decoder.finish())
        self._decoders = []


def generate_text(
    model: Any,
    tokenizer: Tokenizer,
    prompts: str | Context | Sequence[str | Context],
    max_tokens: int,
    *,
    stop: str | Sequence[str | int] = (),
    **options: Any,
) -> TextGeneration:
    """As `generate`, with text.

    Args:
        tokenizer: has `encode` and `decode`: `Bytes()`, `Vocabulary("tokenizer.json")`, or one of transformers.
        prompts: one text or several, or contexts that were read before.
        stop: a row ends with the first of these strings that it makes, which is the end of its text; it may begin and
            end anywhere inside tokens, and what follows it in its last token is left out of the text. A number is a
            token after which a row ends.
        options: those of `generate`, but for `until`.
    """
    texts = [prompts] if isinstance(prompts, (str, Context)) else list(prompts)
    stops = [stop] if isinstance(stop, str) else list(stop)
    strings = [s for s in stops if isinstance(s, str)]
    if not all(strings):
        raise ValueError("stop: want strings of at least one character, got an empty one")
    given = [prompt if isinstance(prompt, Context) else tokenizer.encode(prompt) for prompt in texts]
    last = [token for token in stops if isinstance(token, int)]

    def start(until: Until) -> Generation:
        return generate(model, given, max_tokens, stop=last, until=until, **options)

    return TextGeneration(tokenizer, start, len(given), strings)
