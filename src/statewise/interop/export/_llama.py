"""llama.cpp, through the C interface of llama-cpp-python: token numbers in, logits out."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

import torch
from torch import Tensor

from ._check import relative_error


class LlamaError(RuntimeError):
    """llama.cpp refused a file, or failed."""


class Llama:
    """A GGUF file in llama.cpp, one sequence. Only the last position of a call has logits.

    Args:
        path: the file.
        context: largest number of tokens of a sequence.
    """

    def __init__(self, path: str | os.PathLike, *, context: int = 4096) -> None:
        import llama_cpp

        self._c: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(os.fspath(path).encode(), options)
        if not self._model:
            raise LlamaError(f"llama.cpp: refused {os.fspath(path)}")
        self._rows = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch = context, min(context, 1024)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise LlamaError("llama.cpp: could not make a context")
        # Also when the interpreter ends, and then before the library is taken apart.
        weakref.finalize(self, _free, llama_cpp, self._context, self._model)
        self.context, self._position = context, 0

    def decode(self, tokens: list[int]) -> Tensor:
        """Go on with the sequence: logits (V,) after the last token. Starts anew where the context would be full."""
        if self._position + len(tokens) > self.context:
            self.clear()
        array = (self._c.llama_token * len(tokens))(*tokens)
        if self._c.llama_decode(self._context, self._c.llama_batch_get_one(array, len(tokens))):
            raise LlamaError("llama.cpp: llama_decode failed")
        self._position += len(tokens)
        logits = self._c.llama_get_logits_ith(self._context, -1)
        row = (ctypes.c_float * self._rows).from_address(ctypes.addressof(logits.contents))
        return torch.frombuffer(row, dtype=torch.float32).clone()

    def clear(self) -> None:
        """Forget the sequence."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._position = 0

    def tokenize(self, text: str) -> list[int]:
        """Token numbers of a text, by the vocabulary in the file."""
        data = text.encode()
        room = (self._c.llama_token * (len(data) + 8))()
        vocabulary = self._c.llama_model_get_vocab(self._model)
        count = self._c.llama_tokenize(vocabulary, data, len(data), room, len(room), False, True)
        if count < 0:
            raise LlamaError("llama.cpp: llama_tokenize failed")
        return list(room[:count])


def _free(c: Any, context: Any, model: Any) -> None:
    c.llama_free(context)
    c.llama_model_free(model)


def compare(model: Any, path: str | os.PathLike, prompt: int = 40, steps: int = 24) -> dict[str, float]:
    """The largest relative error of the logits while both continue a random prompt by the model's likeliest tokens."""
    tokens = torch.randint(0, model.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    other, errors = Llama(path), []
    with torch.no_grad():
        logits, state = model.extend(tokens, model.init_state(1))
        want, got = logits[0, -1], other.decode(tokens[0].tolist())
        for _ in range(steps):
            errors.append(relative_error(got[: model.vocab_size], want))
            token = int(want.argmax())
            step, state = model.step(torch.tensor([token]), state)
            want, got = step[0], other.decode([token])
    return {"logits": max(errors)}
