"""What `--state` of `statewise generate` stands for: nothing, a file of one text, or a directory of states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..inference import Context, TextGeneration, read
from ..inference.store import StateStore, load_context, save_context


class Nothing:
    """No state is kept."""

    def begin(self, texts: list[str]) -> list[Any]:
        return list(texts)

    def end(self, run: TextGeneration) -> None:
        return


class File:
    """One text in one file: the prompt is appended to it."""

    def __init__(self, path: str, model: Any, tokenizer: Any, chunk: int) -> None:
        self._path, self._model, self._tokenizer, self._chunk = Path(path), model, tokenizer, chunk

    def begin(self, texts: list[str]) -> list[Any]:
        if len(texts) > 1:
            raise ValueError(f"--state: a file holds one text, got {len(texts)} prompts; want a directory for them")
        context: Context | None = load_context(self._model, self._path) if self._path.exists() else None
        if context is None and not texts:
            raise ValueError(f"--prompt: want a text to begin {self._path} with")
        tokens = self._tokenizer.encode(texts[0]) if texts else []
        return [read(self._model, tokens, context, chunk=self._chunk)]

    def end(self, run: TextGeneration) -> None:
        save_context(self._model, run.tokens.context(), self._path)


class Directory:
    """A store: whatever is known of a prompt's beginning is not read again."""

    def __init__(self, path: str, model: Any, tokenizer: Any, chunk: int, every: int | None) -> None:
        self._store, self._tokenizer, self._chunk, self._every = StateStore(path, model), tokenizer, chunk, every

    def begin(self, texts: list[str]) -> list[Any]:
        if not texts:
            raise ValueError("--prompt: want the whole text to continue, whose beginning is then looked up")
        encoded = [self._tokenizer.encode(text) for text in texts]
        return [self._store.read(tokens, every=self._every, chunk=self._chunk) for tokens in encoded]

    def end(self, run: TextGeneration) -> None:
        for row in range(len(run.texts)):
            self._store.save(run.tokens.context(row))


def keeper(path: str | None, model: Any, tokenizer: Any, chunk: int, every: int | None) -> Nothing | File | Directory:
    """What to begin prompts with, and where to put what becomes of them."""
    single = path is not None and path.endswith(".safetensors")
    if every is not None and (path is None or single):
        raise ValueError("--checkpoint-every: wants --state with a directory, which can hold several states")
    if path is None:
        return Nothing()
    if single:
        return File(path, model, tokenizer, chunk)
    return Directory(path, model, tokenizer, chunk, every)
